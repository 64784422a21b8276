"""The decoder's losses, its inputs and the listener."""

import numpy as np
import pytest
import torch

import codec
import common
import listener
import pulse_codes
import train_vocoder
from common import FRAME_SAMPLES


def test_whitening_folds_into_the_first_convolution(small_codec):
    vocoder = train_vocoder.Vocoder(codec.parts(small_codec).decoder_seanet, 96)
    vocoder.mean.normal_()
    spread = torch.rand(96) * 100 + 0.5
    vocoder.whitening.copy_((torch.eye(96) + 0.1 * torch.randn(96, 96)) / spread[:, None])
    states = torch.randn(1, 24, 96) * spread + vocoder.mean
    with torch.no_grad():
        expected = vocoder(states)
        made = vocoder.folded()(states.transpose(1, 2))
    # The left edge differs: there the convolution pads the unwhitened states with zeros.
    torch.testing.assert_close(made[..., 11520:], expected[..., 11520:], rtol=1e-3, atol=1e-5)


def test_whitening_evens_out_the_axes():
    torch.manual_seed(0)
    axes = torch.linalg.qr(torch.randn(160, 160))[0]
    mixed = torch.randn(4000, 160) * torch.logspace(0, -1, 160) @ axes
    pulses = torch.randn(4000, pulse_codes.PULSE_DIM)
    states = torch.cat([mixed + 3, pulses], 1)
    vocoder = train_vocoder.Vocoder(torch.nn.Sequential(torch.nn.Conv1d(1, 1, 1)), 256)
    vocoder.set_whitening(states)
    made = (states - vocoder.mean) @ vocoder.whitening

    torch.testing.assert_close(made[:, -pulse_codes.PULSE_DIM :], pulses)
    content = made[:, :160]
    assert content.mean(0).abs().max() < 1e-3
    assert content.var(0).mean() == pytest.approx(1, abs=0.05)
    before = torch.linalg.cond(torch.cov((mixed / mixed.std(0)).T)).sqrt().item()
    after = torch.linalg.cond(torch.cov(content.T)).sqrt().item()
    assert after == pytest.approx(before**0.5, rel=0.1)


def test_complex_loss_hears_phase():
    torch.manual_seed(0)
    noise = torch.randn(2, 1, 9600)
    assert train_vocoder.complex_loss(noise, noise) == 0
    assert train_vocoder.complex_loss(torch.zeros_like(noise), noise) == pytest.approx(1, abs=0.01)
    assert train_vocoder.complex_loss(-noise, noise) == pytest.approx(2, abs=0.01)


def test_voiced_loss_hears_phase_in_voiced_frames_only():
    torch.manual_seed(0)
    noise = torch.randn(2, 1, 4 * FRAME_SAMPLES)
    codes = torch.zeros(2, 50, 2, dtype=torch.int64)
    codes[0, 8:20, codec.PULSE_BOOK] = 5
    voiced = train_vocoder.voiced_samples(codes, torch.tensor([20, 40]))[:, : 4 * FRAME_SAMPLES]
    assert voiced[0].all()
    assert not voiced[1].any()
    loss = train_vocoder.voiced_loss(torch.stack([noise[0], -noise[1]]), noise, voiced)
    assert loss < 0.01
    loss = train_vocoder.voiced_loss(torch.zeros_like(noise), noise, voiced)
    assert loss == pytest.approx(1, abs=0.01)
    loss = train_vocoder.voiced_loss(torch.stack([-noise[0], noise[1]]), noise, voiced)
    assert loss == pytest.approx(2, abs=0.01)


def test_the_listener_judges_no_step_that_hears_the_edge():
    torch.manual_seed(0)
    net = listener.Listener(5).eval()
    speech = torch.randn(1, 10 * FRAME_SAMPLES)
    with torch.no_grad():
        whole = net(speech)[1]
        part = net(speech[:, 2400:12000])[1]
    torch.testing.assert_close(listener.inner(part), listener.inner(whole[:, 10:50]))


def test_the_listener_compares_made_with_real_speech():
    torch.manual_seed(0)
    net = listener.Listener(5).eval()
    made, real = torch.randn(2, 2, 1, 12 * FRAME_SAMPLES)
    made.requires_grad_()
    labels = torch.randint(5, (2, 96))
    labels[:, 40:60] = -100  # no sound
    sounds, distance = train_vocoder.listener_losses(net, made, real, labels)
    known = listener.inner(labels) >= 0
    logits = listener.inner(net(made.squeeze(1))[1])[known]
    expected = torch.nn.functional.cross_entropy(logits, listener.inner(labels)[known])
    torch.testing.assert_close(sounds, expected)
    for loss in (sounds, distance):
        (gradient,) = torch.autograd.grad(loss, made, retain_graph=True)
        assert gradient.abs().sum() > 0
    assert train_vocoder.listener_losses(net, made, made, labels)[1] < 1e-5


def test_crops_read_predicted_codes_of_their_own_speech_only(tmp_path, write_speech):
    codes = np.arange(40 * 4, dtype=np.int16).reshape(40, 4)
    ends = np.array([20, 40])
    np.savez(tmp_path / "codes.npz", codes=codes, ends=ends)
    (tmp_path / "phones.txt").write_text("a\nb")
    rows = [dict(speaker=i, phones=[("b", 9600), ("a", 38400)]) for i in (0, 1)]
    write_speech(rows, num_frames=20)
    speech = common.Speech(tmp_path)
    speech.train = [0, 1]
    predicted = codes[20:].copy()
    predicted[:, 2:] = 0
    np.savez(tmp_path / "predicted.npz", codes=predicted, first=1)
    crops = train_vocoder.Crops(tmp_path, speech, predicted_share=1.0, speaker0_share=0.0)
    assert [list(indices) for indices in crops.predicted_indices] == [[], [1]]
    batch, valid, _, sounds = crops.batch()
    assert (batch[..., 2:] == 0).all()
    for end, steps in zip(valid.tolist(), sounds, strict=True):
        assert steps.tolist() == [int(step < 40) for step in range(8 * end - 96, 8 * end)]
    assert train_vocoder.Crops(tmp_path, speech).batch()[0][..., 2:].any()
    np.savez(tmp_path / "predicted.npz", codes=predicted + 1, first=1)
    with pytest.raises(ValueError, match=r"predicted\.npz is of other codes"):
        train_vocoder.Crops(tmp_path, speech, predicted_share=1.0)
