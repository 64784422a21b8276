"""Training that starts from an earlier voice."""

import numpy as np
import pytest
import torch
from transformers import MimiModel

import codec
import lm_warm_start
import train_encoder
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


class Recorded:
    def __init__(self, audio):
        self.audio, self.train = audio, list(range(len(audio)))

    def samples(self, index):
        return self.audio[index]


def test_first_convolution_is_fitted_to_the_new_states(model, monkeypatch):
    monkeypatch.setattr(warm_start, "UTTERANCES", 6)
    monkeypatch.setattr(warm_start, "load_codec", lambda checkpoint: model)
    monkeypatch.setattr(warm_start, "RIDGE", 1e-6)
    rng = np.random.default_rng(0)
    audio = rng.normal(size=(6, 90 * FRAME_SAMPLES)).astype(np.float32)
    with torch.no_grad():
        sounds = torch.from_numpy(audio)[:, None]
        codec.init_codebooks(model, train_encoder.waveform_latents(model, sounds[:, 0]))
        codes = model.encode(sounds).audio_codes.permute(0, 2, 1).flatten(0, 1).numpy()
    warm = warm_start.WarmStart("", Recorded(audio), rng)
    vocoder = train_vocoder.Vocoder(warm.seanet, 128)
    # The same codec and codes: what the earlier decoder read can be told exactly.
    explained = warm.fit(vocoder, model, codes, np.arange(1, 7) * 90)
    assert explained > 0.99


def test_embeddings_are_fitted_to_the_sums():
    torch.manual_seed(0)
    tables = torch.randn(3, 20, 16) * torch.tensor([2.0, 1.0, 0.5])[:, None, None]
    codes = torch.randint(0, 20, (6000, 3))
    values = sum(tables[k][codes[:, k]] for k in range(3)) + 4
    made = lm_warm_start.backfit(codes, values, 25)
    again = sum(made[k][codes[:, k]] for k in range(3))
    assert (again - values).square().mean() < 0.01 * values.var()
    unused = made[:, 20:].sum(0)
    torch.testing.assert_close(
        unused, values.mean(0).expand(5, -1)
    )  # unknown codes: the mean frame


def test_phones_are_told_by_their_words():
    def tokenizer(words, vocab):
        rules = [dict(pattern=dict(Regex=rf"\b{w}\b"), content=c) for w, c in words.items()]
        rules += [dict(pattern=dict(Regex="[;:]+"), content=","), dict(type="Lowercase")]
        return dict(normalizer=dict(normalizers=rules), model=dict(vocab=vocab))

    a, b, c = "\ue000\ue001\ue002"
    earlier = tokenizer(dict(ab=a + b, ba=b + a), {"x": 0, a: 1, b: 2})
    new = tokenizer(dict(ab=b + c, ba=c + b, other=a), {"y": 0, a: 1, b: 2, c: 3, "x": 4})
    assert lm_warm_start.same_tokens(new, earlier) == {2: 1, 3: 2, 4: 0}
