"""The small codec and its codes: bugs that would silently ruin a run."""

import numpy as np
import pytest
import torch
from transformers import MimiModel

import codec
import encode_speech
import pulse_codes
import refit_codes


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
