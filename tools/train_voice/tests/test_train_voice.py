"""Training of the built-in voice: bugs that would silently ruin a run."""

import json

import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, normalizers
from transformers import MimiModel

import codec
import common
import encode_speech
import judge
import listener
import lm
import lm_data
import pulse_codes
import refit_codes
import spelling_rules
import train_lm
import train_vocoder
import wires
from checkpoints import TinyShape, build_tiny
from common import FRAME_SAMPLES, Training
from vox_serve.hub import BUILT_IN_VOICES


@pytest.fixture
def small_codec() -> MimiModel:
    config = codec.make_config(4)
    config.num_filters, config.hidden_size, config.intermediate_size = 8, 96, 64
    config.num_hidden_layers, config.upsample_groups = 1, 96
    config.num_attention_heads = config.num_key_value_heads = 2
    return MimiModel(config).eval()


def test_forward_is_transformers():
    model = build_tiny(TinyShape(), rope="default").model
    config = model.config
    codes = torch.randint(1, config.codec_config.codebook_size, (2, 7, config.num_codebooks))
    with torch.no_grad():
        backbone = model.backbone_model
        expected = backbone(input_ids=codes, use_cache=False).last_hidden_state
        table = lm.rope_table(backbone, torch.arange(7)[None])
        hidden, _ = lm.run_stack(backbone, lm.embed_frames(model, codes), table)
        torch.testing.assert_close(hidden, expected, rtol=1e-4, atol=1e-5)
        rows, wanted = hidden.flatten(0, 1), codes.flatten(0, 1)
        ids = torch.nn.functional.pad(wanted[:, :-1], (1, 0))
        theirs = model.depth_decoder(input_ids=ids, backbone_last_hidden_state=rows).logits
        mine = lm.depth_logits(model, rows, wanted)
        torch.testing.assert_close(mine, theirs[:, -mine.shape[1] :], rtol=1e-4, atol=1e-4)


def test_quantizer_is_the_codecs(small_codec):
    latents = torch.randn(2, small_codec.config.hidden_size, 9)
    codec.init_codebooks(small_codec, torch.randn(4, small_codec.config.hidden_size, 300))
    quantized, _, _, codes = codec.train_quantize(small_codec, latents, update=False)
    assert torch.equal(codes, small_codec.quantizer.encode(latents).transpose(0, 1))
    torch.testing.assert_close(quantized, small_codec.quantizer.decode(codes))


def test_parts_are_found_in_either_layout(small_codec):
    new = codec.parts(small_codec)
    older = torch.nn.Module()  # as transformers was before MimiEncoderModel
    older.encoder, older.decoder = new.encoder_seanet, new.decoder_seanet
    for name in ("encoder_transformer", "downsample", "upsample", "decoder_transformer"):
        setattr(older, name, getattr(new, name))
    assert codec.parts(older) == new
    del older.upsample
    with pytest.raises(RuntimeError, match=r"no module decoder\.upsample or upsample"):
        codec.parts(older)


def test_stage_1_skips_only_the_convolution_stacks(small_codec):
    stage1 = codec.Stage1(small_codec.config, 5)
    skipped = stage1.seanet_names()
    names = [name for name, _ in stage1.named_parameters()]
    stacks = {name for name in names if ".layers." in name and "conv" in name}
    assert skipped == stacks
    assert skipped


def test_pulse_codes_leave_the_other_codebooks_alone():
    config = codec.make_config(4)
    config.num_filters, config.hidden_size, config.upsample_groups = 8, 128, 128
    config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads = 1, 2, 2
    model = MimiModel(config).eval()
    codec.install_pulses(model)
    codec.init_codebooks(model, torch.randn(4, 128, 300))
    latents, pulses = torch.randn(2, 128, 9), torch.randint(0, 509, (2, 9))
    with torch.no_grad():
        quantized, _, _, codes = codec.train_quantize(model, latents, update=False, pulses=pulses)
        theirs = model.quantizer.encode(latents).transpose(0, 1)
    others = [0, 2, 3]
    assert torch.equal(codes[:, others], theirs[:, others])
    assert torch.equal(codes[:, 1], pulses)
    torch.testing.assert_close(quantized, model.quantizer.decode(codes))


def test_decoder_transformer_keeps_the_pulse_channels():
    config = codec.make_config(4)
    config.hidden_size = config.upsample_groups = 128
    config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads = 1, 2, 2
    config.intermediate_size = 64
    model = MimiModel(config).eval()
    codec.install_pulses(model)
    codec.keep_pulses(model)
    quantized = torch.randn(1, 128, 6)
    with torch.no_grad():
        before = codec.parts(model).upsample(quantized).transpose(1, 2)
        after = codec.decoder_states(model, quantized)
    pulses = slice(-pulse_codes.PULSE_DIM, None)
    assert torch.equal(after[..., pulses], before[..., pulses])
    assert not torch.allclose(after[..., : pulses.start], before[..., : pulses.start])


def test_training_leaves_the_pulse_channels_as_they_were():
    config = codec.make_config(4)
    config.hidden_size = config.upsample_groups = 128
    config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads = 1, 2, 2
    config.intermediate_size = 64
    model = MimiModel(config)
    codec.install_pulses(model)
    codec.init_codebooks(model, torch.randn(4, 128, 300))
    codes = torch.randint(1, 509, (1, 4, 6))

    def states():
        return codec.decoder_states(model, model.quantizer.decode(codes))

    before = states()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    before.square().sum().backward()
    optimizer.step()
    codec.keep_pulses(model)
    after = states()
    pulses = slice(-pulse_codes.PULSE_DIM, None)
    torch.testing.assert_close(after[..., pulses], before[..., pulses])
    assert not torch.allclose(after[..., : pulses.start], before[..., : pulses.start])


def test_pulse_codes_follow_the_pitch():
    time_s = np.arange(40 * FRAME_SAMPLES) / 24000
    f0_hz = 180 + 40 * np.sin(2 * np.pi * 0.7 * time_s)
    voiced = (time_s < 1.2) | (time_s > 1.6)
    codes = pulse_codes.encode(f0_hz, voiced)
    assert (codes[16:19] == 0).all()
    assert (codes[:15] > 0).all()
    phase, made_hz = pulse_codes.trajectory(codes)
    inside = slice(FRAME_SAMPLES, 14 * FRAME_SAMPLES)
    assert np.abs(made_hz - f0_hz)[inside].mean() < 4
    advance = np.diff(phase[inside]) * 24000  # no jump in phase at any frame's edge
    np.testing.assert_allclose(advance, made_hz[inside][1:], rtol=0.01)
    start, advance = pulse_codes.unpack(codes)
    both = (codes[1:] > 0) & (codes[:-1] > 0)
    assert ((start[:-1] + advance[:-1])[both] % pulse_codes.GRID == start[1:][both]).all()


def test_pitch_rises_at_question_marks_alone():
    rate = pulse_codes.SAMPLE_RATE_HZ
    f0_hz = np.linspace(220, 160, 3 * rate)
    voiced = np.arange(3 * rate) < 2.6 * rate
    phones = [("a", 1.2 * rate), ("?", 1.5 * rate), ("b", 2.7 * rate), (".", 3.0 * rate)]
    raised = pulse_codes.raise_questions(f0_hz, voiced, phones)
    changed = np.nonzero(raised != f0_hz)[0]
    assert changed[0] >= 0.75 * rate - 1
    assert changed[-1] < 1.5 * rate
    assert (np.diff(raised[int(0.8 * rate) : int(1.2 * rate)]) >= 0).all()
    high_hz = raised[int(1.1 * rate)]
    assert high_hz == pytest.approx(min(208 * 2 ** (8 / 12), pulse_codes.TOP_RISE_HZ), rel=0.01)
    silent = pulse_codes.raise_questions(f0_hz, np.zeros_like(voiced), phones)
    assert (silent == f0_hz).all()


def test_wires_carry_the_phase_up_to_24_khz():
    config = codec.make_config(2)
    model = MimiModel(config)
    codec.install_pulses(model)
    frames = 8
    voiced = np.ones(frames * FRAME_SAMPLES, bool)
    codes = pulse_codes.encode(np.full(frames * FRAME_SAMPLES, 203.0), voiced)
    phase, _ = pulse_codes.trajectory(codes)
    steady = np.arange(len(phase)) % FRAME_SAMPLES > pulse_codes.GLIDE_SAMPLES
    steady[: 2 * FRAME_SAMPLES] = False  # F0 glides at first
    with torch.no_grad():
        vectors = codec.pulse_vectors(model, torch.from_numpy(codes)[None])
        hidden = torch.zeros(1, config.hidden_size, frames)
        hidden[:, -pulse_codes.PULSE_DIM :] = vectors[:, codec.CONTENT_DIM :]
        decoder = codec.parts(model)
        hidden = decoder.upsample(hidden)
        wires.carry_pulses(decoder.decoder_seanet)
        # layer -> middle of a step's first point and of its bins in samples, first bin, tolerance
        rates = {6: (5, 10, 4, 0.02), 9: (2, 2, 2, 0.1), 12: (0.5, 0.5, 2, 0.15)}
        for index, layer in enumerate(decoder.decoder_seanet.layers):
            hidden = layer(hidden)
            if index not in rates:
                continue
            wire_at, bin_at, first_bin, tolerance = rates[index]
            at = np.arange(hidden.shape[2]) * (len(phase) // hidden.shape[2])
            kept = steady[at]
            made = hidden[0, :2].T[kept] - wires.WIRE_OFFSET
            # Sample n's phase is taken at n + 0.5.
            wire_phase, bin_phase = (
                np.interp(at + middle - 0.5, np.arange(len(phase)), phase)[kept]
                for middle in (wire_at, bin_at)
            )
            angle = 2 * np.pi * wire_phase
            wanted = np.stack([np.cos(angle), np.sin(angle)], 1)
            np.testing.assert_allclose(made, wanted, atol=tolerance)
            count = wires.BINS[list(rates).index(index)]
            highest = hidden[0, first_bin : first_bin + count].T[kept].argmax(1).numpy()
            assert (highest == np.round(bin_phase * count) % count).mean() > 0.9


def test_codebook_update_follows_its_vectors(small_codec):
    book = codec.rvqs(small_codec)[0].layers[0].codebook
    vectors = torch.randn(64, book.embed_sum.shape[1])
    index = torch.arange(64) % 2
    for _ in range(400):
        codec.update_codebook(book, vectors, index)
    means = torch.stack([vectors[index == code].mean(0) for code in (0, 1)])
    torch.testing.assert_close(codec.codebook_vectors(book)[:2], means, rtol=1e-3, atol=1e-3)


def test_codes_are_fitted_to_sounds_and_leave_the_pulses(monkeypatch):
    """k-means finds the loud directions of the latents; codebook 0 has to tell the sounds, which
    are in a quiet one."""
    monkeypatch.setattr(refit_codes, "STEPS", 300)
    monkeypatch.setattr(refit_codes, "BATCH", 256)
    torch.manual_seed(0)
    config = codec.make_config(4)
    config.num_filters, config.hidden_size, config.upsample_groups = 8, 128, 128
    config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads = 1, 2, 2
    config.codebook_size = 512
    stage1 = codec.Stage1(config, 6)
    labels = torch.randint(6, (4000, 1)).expand(-1, 4)
    latents = torch.randn(4000, 128)
    latents[:, :6] = torch.eye(6)[labels[:, 0]] * 2
    codec.init_codebooks(stage1.codec, latents.T[None])

    def codes_and_books():
        books = [layer.codebook for rvq in codec.rvqs(stage1.codec) for layer in rvq.layers]
        codes = stage1.codec.quantizer.encode(latents.T[None])[:, 0]
        return codes, codec.codebook_vectors(books[codec.PULSE_BOOK]).clone()

    def told(codes):
        """The share of frames whose code tells the sound."""
        guesses = refit_codes.sound_logits(codes, labels, 512, 6)[codes][:, :6].argmax(1)
        return (guesses == labels[:, 0]).float().mean()

    with torch.no_grad():
        before, pulses = codes_and_books()
        refit_codes.refit(stage1, latents, labels)
        after, same = codes_and_books()
    assert torch.equal(same, pulses)
    assert told(before[0]) < 0.9 < told(after[0])


def test_a_codec_of_other_codes_is_refused(small_codec, tmp_path):
    encode_speech.write_codec(small_codec, tmp_path / "codec")
    encode_speech.write_codec(small_codec, tmp_path / "codec")
    codec.rvqs(small_codec)[1].layers[0].codebook.embed_sum[3] += 1
    with pytest.raises(ValueError, match="is of other codes"):
        encode_speech.write_codec(small_codec, tmp_path / "codec")


def test_utterances_that_are_encoded_keep_their_codes(tmp_path):
    path = tmp_path / "codes.npz"
    codes = [np.full((count, 7), count, np.int16) for count in (3, 1, 2)]
    pulses = [item[:, codec.PULSE_BOOK] for item in codes]
    assert encode_speech.known_codes(path, pulses) == [None] * 3
    np.savez(path, codes=np.concatenate(codes), ends=np.cumsum([3, 1, 2]))
    found = encode_speech.known_codes(path, [*pulses, np.zeros(4)])
    assert all(map(np.array_equal, found[:3], codes))
    assert found[3] is None
    spoken_again = encode_speech.known_codes(path, [pulses[0], pulses[1] + 1, pulses[2]])
    assert [item is None for item in spoken_again] == [False, True, False]


def test_reserved_code_is_never_used(small_codec):
    codec.reserve_stop_code(small_codec)
    codes = small_codec.quantizer.encode(torch.randn(8, small_codec.config.hidden_size, 50))
    assert (codes[0] > 0).all()


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


def test_corruption_replaces_history_by_codes_of_other_frames():
    torch.manual_seed(1)
    codes = torch.arange(1, 401).view(4, 100, 1) + torch.tensor([0, 1000, 2000])
    is_frame = torch.ones(4, 100, dtype=torch.bool)
    changed = train_lm.corrupt(codes, is_frame)
    assert torch.equal(changed // 1000, codes // 1000)  # every code still belongs to its codebook
    share = (changed != codes).float().mean((1, 2))
    assert 0.02 < share.mean() < 0.6
    semantic, pulse, acoustic = ((changed != codes)[..., k].float().mean() for k in range(3))
    assert semantic < acoustic
    assert pulse < acoustic


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


def test_a_question_mark_before_a_word_takes_no_time():
    phones = [("", 10), ("s", 20), ("i", 30), (" ", 40), ("x", 50), ("?", 60), ("", 70)]
    marked = lm_data.align_text(["s", "i", " ", "?", "x", "?"], phones)
    assert marked.tolist() == [10, 20, 30, 40, 40, 50, 60, 70]
    plain = lm_data.align_text(["s", "i", " ", "x", "?"], phones)
    assert plain.tolist() == [10, 20, 30, 40, 50, 60, 70]
    first = lm_data.align_text(["?", "s", "?"], [("", 10), ("s", 20), ("?", 30), ("", 40)])
    assert first.tolist() == [10, 10, 20, 30, 40]


def write_speech(run, rows, num_frames):
    """Silent utterances of `num_frames` each."""
    (run / "data").mkdir()
    samples = num_frames * FRAME_SAMPLES
    rows = [row | dict(start_sample=i * samples, num_samples=samples) for i, row in enumerate(rows)]
    (run / "data" / "0000.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "data" / "0000.i16").write_bytes(bytes(2 * samples * len(rows)))


def test_a_label_is_the_sound_in_the_middle_of_its_step(tmp_path):
    phones = [("", 100), ("\u02c8b", 1300), ("?", 1500), ("a", 1900)]
    write_speech(tmp_path, [dict(phones=phones)], num_frames=1)
    assert common.Speech(tmp_path).sounds == [" ", "a", "b"]
    assert common.Speech(tmp_path).labels(0, 480).tolist() == [2, 2, 2, 1]  # the last sound goes on
    (tmp_path / "phones.txt").write_text("a\n ")  # of the data before b was added
    assert common.Speech(tmp_path).labels(0, 480).tolist() == [-100, -100, -100, 0]


def test_crops_read_predicted_codes_of_their_own_speech_only(tmp_path):
    codes = np.arange(40 * 4, dtype=np.int16).reshape(40, 4)
    ends = np.array([20, 40])
    np.savez(tmp_path / "codes.npz", codes=codes, ends=ends)
    (tmp_path / "phones.txt").write_text("a\nb")
    rows = [dict(speaker=i, phones=[("b", 9600), ("a", 38400)]) for i in (0, 1)]
    write_speech(tmp_path, rows, num_frames=20)
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


def test_every_frame_is_spoken_by_its_tokens():
    example = dict(
        tokens=np.arange(5),
        token_ends=np.array([0.0, 0, 0, 1.5, 4]) * FRAME_SAMPLES,
        codes=np.arange(8, dtype=np.int16).reshape(4, 2) + 1,
        labels=np.zeros((4, 4), np.int64),
    )
    spans = lm_data.spans(example)
    np.testing.assert_allclose(spans.sum(1), 1)
    np.testing.assert_allclose(spans[:2, 3:], [[1, 0], [0.5, 0.5]])
    batch = lm_data.collate([[example]], 2)
    assert batch["codes"][0, 5].tolist() == [1, 2]
    assert batch["targets"][0, 4].tolist() == [1, 2]  # the last token predicts the first frame
    assert batch["targets"][0, 8].tolist() == [0, 0]  # and the last frame predicts the stop frame
    assert (batch["targets"][0, 9:] == -100).all()


def test_validation_has_both_speakers(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    rows = [dict(speaker=i % 2, start_sample=0, num_samples=0) for i in range(500)]
    (folder / "0000.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "0000.i16").write_bytes(bytes(2))
    speech = common.Speech(tmp_path)
    assert {speech.rows[i]["speaker"] for i in speech.validation} == {0, 1}
    assert sorted(speech.train + speech.validation) == list(range(500))


def test_training_resumes(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "plot", lambda path: None)
    monkeypatch.setattr(common, "LOG_STEPS", 1)
    clock = iter(range(0, 10_000, 30))
    monkeypatch.setattr(Training, "clock_s", lambda self: next(clock))

    def run(minutes):
        weight = torch.nn.Linear(1, 1, bias=False)
        states = {"weight": weight, "sgd": torch.optim.SGD(weight.parameters(), lr=0.1)}
        training = Training(tmp_path, "toy", minutes, states, warmup=1)
        rates = []
        for _ in training.steps():
            rates.append(states["sgd"].param_groups[0]["lr"])
            weight.weight.data += 1
            training.log(loss=weight.weight)
        return training.step, rates, weight.weight.item()

    steps, rates, value = run(2)
    assert (steps, rates[0]) == (4, 0.1)
    assert rates == sorted(rates, reverse=True)
    more, rates, after = run(4)  # starts from the first run's peak rate, not from its decayed rate
    assert (more, after) == (8, pytest.approx(value + 4))
    assert rates[0] == 0.1
    rows = [json.loads(line) for line in (tmp_path / "toy.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 9))


@pytest.mark.parametrize(
    ("reference", "heard", "errors"),
    [
        ("It's 7 o'clock, okay?", "its seven o'clock ok", 1),
        ("one two three", "", 3),
        ("one two three", "zero one two three four", 2),
        ("the cat sat", "the bat sat", 1),
        ("four or five thousand a year, at seven thirty", "4 or 5,000 a year at 7 30", 0),
        ("our neighbourhood's favourite colours", "our neighborhood's favorite colors", 0),
    ],
)
def test_word_errors(reference, heard, errors):
    assert judge.word_errors(reference, heard) == (errors, len(judge.words(reference)))


@pytest.mark.parametrize("f0_hz", [95.0, 118.0, 195.0, 240.0])
def test_median_f0(f0_hz):
    time_s = np.arange(24000) / 24000
    voice = sum(np.sin(2 * np.pi * f0_hz * n * time_s) / n for n in range(1, 12)) * 0.1
    voice += 0.02 * np.random.default_rng(0).standard_normal(24000)
    assert judge.median_f0_hz(voice.astype(np.float32)) == pytest.approx(f0_hz, rel=0.02)


def test_built_in_tokenizer_spells_in_phones():
    tokenizer = Tokenizer.from_file(str(BUILT_IN_VOICES / "demo" / "tokenizer.json"))

    def spell(text):
        return tokenizer.encode(f"[1]{text}").tokens

    for same, as_well in (
        ("Dr. Smith", "doctor Smith"),
        ("Mrs. Jones, 42%", "mrs jones, forty two percent"),
        ("at 7:30 p.m.", "at seven thirty P M."),
        ("It costs $120, or £1.", "it costs one hundred twenty dollars, or one pound."),
        ("the 21st, 1,250 times", "the twenty first, one thousand two hundred fifty times"),
        ("a café, -5", "a cafe, minus five"),
        ("I didn\u2019t \u2014 stop!", "i didn't stop!"),
    ):
        assert spell(same) == spell(as_well)
    for same, as_well in (("Really!?", "Really?"), ("At 5 p.m.?", "at five p m?")):
        assert spell(same) == spell(as_well)
    so = spell("so")[4:-1]
    assert spell("Is it so?")[4:-1] == [*spell("Is it")[4:-1], " ", "?", *so, "?"]
    assert spell("So?")[4:-1] == ["?", *so, "?"]
    assert spell("hello")[1:4] == ["[", "1", "]"]
    for word in ("hello", "Netherfield", "zqxv", "y'x", "knogh"):
        assert all("\ue000" <= token < "\ue400" for token in spell(word)[4:-1]), word
    assert spell("shunt") == spell("shunted")[:-3] + spell("shunted")[-1:]


def test_spelling_rules_read_words_that_they_have_not_seen():
    sounds = {"sh": ["S"], "ee": ["i"], "kn": ["n"], **{c: [c] for c in "bdfklmnprst"}, "a": ["A"]}
    words = {}
    for start in ("sh", "kn", "b", "f", "m", "s", "t", "l"):
        for middle in ("ee", "a"):
            for end in ("sh", "b", "d", "n", "p", "k", "t"):
                words[start + middle + end] = sounds[start] + sounds[middle] + sounds[end]
    rules = spelling_rules.SpellingRules(words, min_gain=2)
    assert rules.read("kneesh") == ("n", "i", "S")
    assert rules.read("sheemash") == ("S", "i", "m", "A", "S")
    assert rules.read("banks")[:4] == ("b", "A", "n", "k")  # "kn" only at the start
    texts = ["sheemash", "kneeshee", "bankfad", "fee sha"]
    tokenizer = normalizers.Sequence(
        [
            normalizers.Replace(Regex(pattern), chr(0xE000 + ord("".join(spoken) or "_")))
            for pattern, spoken in rules.replacements()
            if len(spoken) < 2
        ]
    )
    for text in texts:
        spelt = [chr(0xE000 + ord(phone)) for word in text.split() for phone in rules.read(word)]
        made = tokenizer.normalize_str(text).replace(" ", "").replace(chr(0xE000 + ord("_")), "")
        assert made == "".join(spelt), text


def test_pulses_move_to_their_marks():
    time_s = np.arange(24000) / 24000
    source, target_hz, source_hz = 190 * time_s, 130 * time_s, 190.0
    voiced = np.ones(24000, bool)
    train = pulse_codes.pulses(source, np.full(24000, source_hz), voiced)
    marks = pulse_codes.pulse_marks(source, voiced)
    periods = np.full(len(marks), 24000 / source_hz)
    targets = pulse_codes.pulse_marks(target_hz, voiced)
    moved = pulse_codes.move_pulses(train, marks, periods, targets)
    peaks = np.nonzero(moved > 0.7 * moved.max())[0]
    distance = np.abs(peaks[:, None] - targets).min(1)
    assert distance.max() <= 1
    assert len(targets) == 129
