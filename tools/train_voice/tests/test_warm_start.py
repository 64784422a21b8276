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
import train_vocoder
import warm_start
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


def test_codes_of_an_earlier_voice_get_the_known_pulses():
    def encode(audio):
        count = audio.shape[1] // FRAME_SAMPLES
        return torch.arange(len(audio) * count * 3).view(len(audio), count, 3)

    pulses = [np.full(5, 7), np.full(2, 9)]
    batch = [np.zeros(len(p) * FRAME_SAMPLES, np.float32) for p in pulses]
    made = encode_speech.encode_as(SimpleNamespace(encode=encode), batch, pulses)
    every = np.arange(2 * 5 * 3).reshape(2, 5, 3)
    for codes, own, known in zip(made, every, pulses, strict=True):
        assert codes.shape == (len(known), 3)
        assert (codes[:, codec.PULSE_BOOK] == known).all()
        assert (codes[:, [0, 2]] == own[: len(known), [0, 2]]).all()


def test_first_convolution_is_fitted_to_the_new_states(model, monkeypatch, tmp_path):
    """If the new codes are the earlier ones, what the earlier decoder read can be told exactly."""
    monkeypatch.setattr(warm_start, "RIDGE", 1e-6)
    rng = np.random.default_rng(0)
    codes = rng.integers(1, 300, (540, 3))
    for name, count in (("codes", 6), ("earlier_codes", 5)):
        np.savez(tmp_path / f"{name}.npz", codes=codes, ends=np.arange(1, count + 1) * 90)
    pairs = warm_start.utterance_pairs(tmp_path, range(6), rng)
    assert len(pairs) == 5
    vocoder = train_vocoder.Vocoder(copy.deepcopy(codec.parts(model).decoder_seanet), 128)
    vocoder.set_whitening(warm_start.codec_states(model, pairs[0][0]).detach())
    assert warm_start.fit_first(vocoder, model, model, pairs) > 0.99
    states = warm_start.codec_states(model, torch.from_numpy(codes[:40]))[None]
    with torch.no_grad():
        made = vocoder(states)
        expected = codec.parts(model).decoder_seanet(states.transpose(1, 2))
    torch.testing.assert_close(made, expected, rtol=0.05, atol=0.05 * float(expected.std()))


def language_model(mimi):
    config = lm.make_config(
        mimi.config, SimpleNamespace(token_to_id=lambda t: 1, get_vocab_size=lambda: 9)
    )
    config.codec_config = mimi.config
    made = lm.make_model(config).eval()
    made.codec_model = mimi
    return made


def test_a_language_model_starts_from_an_earlier_one(model, tmp_path, monkeypatch):
    """New codes that only have other numbers get the embeddings and the heads of the earlier."""
    monkeypatch.setattr(lm_warm_start, "RIDGE", 1e-3)
    earlier, new = language_model(model), language_model(model)
    before = torch.cat([torch.randint(1, 40, (600, 3)), torch.arange(1, 40)[:, None].expand(-1, 3)])
    renamed = 1 + torch.stack([torch.randperm(39) for _ in range(3)])
    codes = torch.stack([renamed[k][before[:, k] - 1] for k in range(3)], 1)
    rules = [dict(pattern=dict(Regex=r"\bab\b"), content="\ue000\ue001")]
    spelt = dict(normalizer=dict(normalizers=rules), model=dict(vocab={"x": 0, "\ue000": 1}))
    for name, stream in (("earlier_codes", before), ("codes", codes)):
        np.savez(tmp_path / f"{name}.npz", codes=stream.numpy(), ends=[100, len(stream)])
    earlier.save_pretrained(tmp_path / "earlier")
    for folder in (tmp_path, tmp_path / "earlier"):
        (folder / "tokenizer.json").write_text(json.dumps(spelt))
    lm_warm_start.transfer(new, tmp_path / "earlier", tmp_path)

    stop = torch.zeros(1, 3, dtype=torch.long)
    with torch.no_grad():
        for theirs, own in ((before, codes), (stop, stop)):
            expected = lm.embed_frames(earlier, theirs)
            torch.testing.assert_close(lm.embed_frames(new, own), expected, atol=1e-2, rtol=0)
    cooler = lm_warm_start.EXPORTED_TEMPERATURE / lm_warm_start.SERVED_TEMPERATURE
    head, known = new.lm_head.weight, earlier.lm_head.weight * cooler
    torch.testing.assert_close(head[renamed[0]], known[1:40])
    torch.testing.assert_close(head[0], known[0])
    heads, known = new.depth_decoder.codebooks_head.weight, earlier.depth_decoder.codebooks_head
    for k in (1, 2):
        expected = known.weight[k - 1][:, 1:40] * cooler
        torch.testing.assert_close(heads[k - 1][:, renamed[k]], expected)
    theirs = earlier.backbone_model.layers[1].mlp.up_proj.weight
    assert torch.equal(new.backbone_model.layers[1].mlp.up_proj.weight, theirs)
    text = new.embed_text_tokens.weight[:2], earlier.embed_text_tokens.weight[:2]
    torch.testing.assert_close(*text)


def test_only_the_same_speech_translates(tmp_path):
    codes = np.arange(24).reshape(12, 2)
    for name, ends in (("new", [4, 9, 12]), ("earlier", [4, 9]), ("other", [5, 9])):
        np.savez(tmp_path / f"{name}.npz", codes=codes[: ends[-1]], ends=ends)
    new, earlier = lm_warm_start.shared_frames(tmp_path / "new.npz", tmp_path / "earlier.npz")
    assert new.tolist() == earlier.tolist() == codes[:9].tolist()
    with pytest.raises(ValueError, match="not of the same speech"):
        lm_warm_start.shared_frames(tmp_path / "new.npz", tmp_path / "other.npz")


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
