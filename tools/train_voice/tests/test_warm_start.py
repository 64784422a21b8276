"""Training that starts from an earlier voice."""

import copy
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import MimiModel

import codec
import encode_speech
import lm
import lm_warm_start
import muon
import pulse_codes
import train_vocoder
import warm_start
import wires
from common import FRAME_SAMPLES


@pytest.fixture
def model() -> MimiModel:
    torch.manual_seed(0)
    config = codec.make_config(3)
    config.num_filters, config.hidden_size, config.upsample_groups = 10, 128, 128
    config.num_hidden_layers, config.intermediate_size = 1, 64
    config.num_attention_heads = config.num_key_value_heads = 2
    made = MimiModel(config).eval()
    codec.install_pulses(made)
    return made


def test_room_is_made_without_a_change(model):
    seanet = codec.parts(model).decoder_seanet
    states = torch.randn(2, 128, 24)
    with torch.no_grad():
        expected = seanet(states)
        order = warm_start.make_room(seanet, seanet.layers[0](states))
        torch.testing.assert_close(seanet(states), expected)
    assert sorted(order.tolist()) == list(range(160))
    hidden = warm_start.outputs(seanet, seanet.layers[0](states))
    for stage, values in enumerate(hidden):
        weight, dim = warm_start.consumer(seanet, stage)
        size = weight.transpose(0, dim).flatten(1).norm(dim=1)
        effect = torch.nn.functional.elu(values).std((0, 2)) * size
        assert (effect.diff() >= -1e-6).all()  # the least important channels come first


def test_wires_leave_the_other_channels_alone(model):
    seanet = codec.parts(model).decoder_seanet
    before = {name: p.clone() for name, p in seanet.named_parameters()}
    warm_start.add_wires(seanet)
    with torch.no_grad():
        for stage, count in enumerate(wires.COUNTS):
            layer = (0, *warm_start.UPSAMPLINGS)[stage]
            old = before[f"layers.{layer}.conv.weight"]
            new = seanet.layers[layer].conv.weight
            if stage == 0:
                assert torch.equal(new[count:], old[count:])
                continue
            read = wires.COUNTS[stage - 1]
            assert torch.equal(new[read:, count:], old[read:, count:])
            torch.testing.assert_close(new[:read, count:], warm_start.LEAK * old[:read, count:])


@pytest.mark.parametrize("has_pulses", [False, True])
def test_codes_of_an_earlier_voice_get_the_known_pulses(has_pulses):
    books = 3 if has_pulses else 2

    def encode(audio):
        count = audio.shape[1] // FRAME_SAMPLES
        return torch.arange(len(audio) * count * books).view(len(audio), count, books)

    dim = codec.CONTENT_DIM + has_pulses * 96
    mimi = SimpleNamespace(config=SimpleNamespace(codebook_dim=dim), encode=encode)
    pulses = [np.full(5, 7), np.full(2, 9)]
    batch = [np.zeros(len(p) * FRAME_SAMPLES, np.float32) for p in pulses]
    made = encode_speech.encode_as(mimi, batch, pulses)
    every = np.arange(2 * 5 * books).reshape(2, 5, books)
    for codes, own, known in zip(made, every, pulses, strict=True):
        assert codes.shape == (len(known), 3)
        assert (codes[:, codec.PULSE_BOOK] == known).all()
        assert (codes[:, [0, 2]] == own[: len(known), [0, -1]]).all()


def without_pulses(config):
    """A codec with the content codebooks of `config` alone."""
    config = copy.deepcopy(config)
    config.num_quantizers -= 1
    config.codebook_dim = config.vector_quantization_hidden_dimension = codec.CONTENT_DIM
    made = MimiModel(config).eval()
    for rvq in codec.rvqs(made):
        for layer in rvq.layers:
            torch.nn.init.normal_(layer.codebook.embed_sum)
            layer.codebook.cluster_usage.fill_(2.0)
    return made


@pytest.mark.parametrize("has_pulses", [False, True])
def test_first_convolution_is_fitted_to_the_new_states(model, monkeypatch, has_pulses):
    earlier = model
    if not has_pulses:
        earlier = without_pulses(model.config)
        codec.adopt_codes(model, earlier)
    monkeypatch.setattr(warm_start, "load_codec", lambda checkpoint: earlier)
    monkeypatch.setattr(warm_start, "RIDGE", 1e-6)
    rng = np.random.default_rng(0)
    codes = rng.integers(1, 300, (540, 3))
    ends = np.arange(1, 7) * 90
    warm = warm_start.WarmStart("", codes, ends, range(6), rng)
    vocoder = train_vocoder.Vocoder(warm.seanet, 128)
    explained = warm.fit(vocoder, model)
    # With known pulses, what the earlier decoder read can be told exactly; without, some channels
    # of the states have made room for them.
    assert explained > (0.99 if has_pulses else 0.5)


def test_adopted_codes_keep_their_meaning(model):
    earlier = without_pulses(model.config)
    codec.adopt_codes(model, earlier)
    audio = torch.randn(2, 9 * FRAME_SAMPLES)
    pulses = torch.randint(0, 512, (2, 9))
    with torch.no_grad():
        latents = codec.waveform_latents(earlier, audio)
        codes = codec.train_quantize(model, latents, update=False, pulses=pulses)[3]
        expected = earlier.encode(audio[:, None]).audio_codes
    assert torch.equal(codes[:, codec.PULSE_BOOK], pulses)
    kept = [k for k in range(codes.shape[1]) if k != codec.PULSE_BOOK]
    assert torch.equal(codes[:, kept], expected)


def language_model(mimi):
    config = lm.make_config(
        mimi.config, SimpleNamespace(token_to_id=lambda t: 1, get_vocab_size=lambda: 9)
    )
    config.codec_config = mimi.config
    made = lm.make_model(config).eval()
    made.codec_model = mimi
    return made


def test_language_model_knows_the_adopted_codes(model, tmp_path):
    earlier = language_model(without_pulses(model.config))
    codec.adopt_codes(model, earlier.codec_model)
    new = language_model(model)
    for folder, voice in (("earlier", earlier), ("run", new)):
        voice.save_pretrained(tmp_path / folder)
        rules = [dict(pattern=dict(Regex=r"\bab\b"), content="\ue000\ue001")]
        vocab = {"x": 0, "\ue000": 1, "\ue001": 2}
        spelt = dict(normalizer=dict(normalizers=rules), model=dict(vocab=vocab))
        (tmp_path / folder / "tokenizer.json").write_text(json.dumps(spelt))
    lm_warm_start.transfer(new, tmp_path / "earlier", tmp_path / "run", model)
    codes = torch.randint(1, 512, (5, 3))
    codes[:, codec.PULSE_BOOK] = 0
    kept = codes[:, [0, 2]]
    offset = new.backbone_model.embed_tokens.embed_audio_tokens.weight[new.config.vocab_size]
    with torch.no_grad():
        torch.testing.assert_close(
            lm.embed_frames(new, codes) - offset, lm.embed_frames(earlier, kept)
        )
    cooler = lm_warm_start.EXPORTED_TEMPERATURE / lm_warm_start.SERVED_TEMPERATURE
    heads = earlier.depth_decoder.codebooks_head.weight
    torch.testing.assert_close(new.depth_decoder.codebooks_head.weight[1:], heads * cooler)
    torch.testing.assert_close(new.lm_head.weight, earlier.lm_head.weight * cooler)
    torch.testing.assert_close(
        new.embed_text_tokens.weight[:3], earlier.embed_text_tokens.weight[:3]
    )


def test_other_codes_are_refused(model):
    earlier = without_pulses(model.config)
    with pytest.raises(ValueError, match="other codes"):
        lm_warm_start.check_codes(model, earlier)


def test_phones_are_told_by_their_words():
    def tokenizer(words, vocab):
        rules = [dict(pattern=dict(Regex=rf"\b{w}\b"), content=c) for w, c in words.items()]
        rules += [dict(pattern=dict(Regex="[;:]+"), content=","), dict(type="Lowercase")]
        return dict(normalizer=dict(normalizers=rules), model=dict(vocab=vocab))

    a, b, c = "\ue000\ue001\ue002"
    earlier = tokenizer(dict(ab=a + b, ba=b + a), {"x": 0, a: 1, b: 2})
    new = tokenizer(dict(ab=b + c, ba=c + b, other=a), {"y": 0, a: 1, b: 2, c: 3, "x": 4})
    assert lm_warm_start.same_tokens(new, earlier) == {2: 1, 3: 2, 4: 0}


def test_muon_is_torchs():
    torch.manual_seed(0)
    own = [torch.nn.Parameter(torch.randn(shape)) for shape in ((48, 20), (20, 48), (32, 32))]
    torchs = [torch.nn.Parameter(p.detach().clone()) for p in own]
    optimizers = [
        kind(parameters, lr=0.02, weight_decay=0.01)
        for kind, parameters in ((muon.Muon, own), (torch.optim.Muon, torchs))
    ]
    for _ in range(3):
        for a, b in zip(own, torchs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(own, torchs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-3)  # bfloat16 has 8 bits; a step is 0.02


def test_pulses_are_guessed_from_latents(model, monkeypatch):
    """An encoder whose latents hold voicing and F0 learns to tell them."""
    codes = np.array([0, *range(1, 320, 40)])  # F0 of 56 to 300 Hz
    book = codec.rvqs(model)[1].layers[codec.PULSE_BOOK - 1].codebook
    hats = codec.codebook_vectors(book)[:, -pulse_codes.F0_HATS - 2 :]
    mixing = torch.randn(hats.shape[1], 128)
    monkeypatch.setattr(warm_start, "waveform_latents", lambda _, audio: audio.transpose(1, 2))
    pulses = np.random.default_rng(0).choice(codes, (4, 300))
    speech = SimpleNamespace(
        samples=lambda i: (hats[pulses[i]] @ mixing).numpy(), pulses=lambda i: pulses[i]
    )
    monkeypatch.setattr(warm_start, "RIDGE", 1e-6)
    warm_start.fit_pulses(model, speech, range(4))
    latents = (hats[torch.from_numpy(codes)] @ mixing).T[None]
    with torch.no_grad():
        made = model.quantizer.encode(latents)[codec.PULSE_BOOK, 0].numpy()
    assert ((made > 0) == (codes > 0)).all()
    known, told = (pulse_codes.unpack(c[codes > 0])[1] for c in (codes, made))
    assert np.abs(np.log2(told / known)).max() < 0.2
