"""The codec against transformers' and moshi's whole decoding and encoding."""

import pytest
import torch

from mimi_oracles import (
    TINY,
    assert_same_audio,
    hf_decode,
    hf_encode,
    moshi_file_tensors,
    random_codes,
    random_moshi_mimi,
    save_hf_mimi,
)
from vox_serve.mimi import load_mimi, mimi_from_checkpoint
from vox_serve.mimi.tensors import PRECISIONS

SHAPES = {
    "tiny": {},
    "grouped_heads": {
        "num_key_value_heads": 2,
        "head_dim": 6,
        "attention_bias": True,
        "norm_eps": 1e-3,
        "num_semantic_quantizers": 3,
        "rope_parameters": {"rope_type": "default", "rope_theta": 50.0},
        "hidden_act": "silu",
    },
    "deep_units": {
        "num_residual_layers": 3,
        "dilation_growth_rate": 3,
        "residual_kernel_size": 5,
        "kernel_size": 3,
        "last_kernel_size": 1,
        "compress": 4,
        "use_conv_shortcut": True,
        "upsampling_ratios": [3, 1, 2],
        "upsample_groups": 8,
    },
    "one_step_a_frame": {"frame_rate": 70.0, "upsample_groups": 16},
    "four_steps_a_frame": {
        "frame_rate": 20.0,
        "upsampling_ratios": [5, 2],
        "pad_mode": "replicate",
        "upsample_groups": 1,
        "sliding_window": 1,
        "codebook_dim": 32,
        "vector_quantization_hidden_dimension": 32,
    },
}


@pytest.fixture(scope="module", params=SHAPES)
def pair(request, tmp_path_factory):
    """A random transformers model, and ours loaded from its file."""
    folder = tmp_path_factory.mktemp(request.param)
    return save_hf_mimi(folder, **SHAPES[request.param]), load_mimi(folder)


@pytest.fixture(scope="module")
def real_window(tmp_path_factory):
    """A small model with the real attention window: 250 steps, 125 frames."""
    folder = tmp_path_factory.mktemp("window")
    return save_hf_mimi(folder, sliding_window=250), load_mimi(folder)


@pytest.fixture(scope="module")
def moshi_pair():
    pytest.importorskip("moshi", reason="moshi, the second oracle, is not installed")
    moshi = random_moshi_mimi()
    return moshi, mimi_from_checkpoint(moshi_file_tensors(moshi), TINY)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def stream(mimi, codes, chunks, state=None):
    """Decode in chunks of these sizes; the last size repeats."""
    state = mimi.init_state(codes.shape[0]) if state is None else state
    chunks, parts = list(chunks), []
    while codes.shape[1]:
        size = chunks.pop(0) if len(chunks) > 1 else chunks[0]
        parts.append(mimi.decode_step(codes[:, :size], state))
        codes = codes[:, size:]
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("codebooks", [1, 4, 8])
def test_whole_decode_equals_transformers(pair, codebooks):
    hf, mimi = pair
    codes = random_codes(2, 21, codebooks)
    assert_same_audio(mimi.decode(codes), hf_decode(hf, codes))


@pytest.mark.parametrize("chunks", [[1], [3], [1, 7, 0, 2, 11]])
def test_stream_equals_transformers(pair, chunks):
    hf, mimi = pair
    codes = random_codes(2, 23)
    assert_same_audio(stream(mimi, codes, chunks), hf_decode(hf, codes))


@pytest.mark.parametrize("chunks", [[1], [3], [7], [64, 1, 2, 33, 5]])
def test_stream_far_past_the_window(real_window, chunks):
    hf, mimi = real_window
    codes = random_codes(1, 170)
    expected = hf_decode(hf, codes)
    assert_same_audio(stream(mimi, codes, chunks), expected)
    assert_same_audio(mimi.decode(codes), expected)


def test_decode_equals_moshi(moshi_pair):
    moshi, mimi = moshi_pair
    codes = random_codes(2, 30)
    with torch.no_grad():
        expected = moshi.decode(codes.transpose(1, 2))[:, 0]
    assert_same_audio(mimi.decode(codes), expected)
    assert_same_audio(stream(mimi, codes, [1]), expected)


@pytest.mark.parametrize("samples", [1, 15, 16, 17, 16 * 30 - 1])
def test_encode_equals_moshi_at_any_length(moshi_pair, samples):
    moshi, mimi = moshi_pair
    audio = torch.randn(2, samples) * 0.3
    with torch.no_grad():
        expected = moshi.encode(audio[:, None]).transpose(1, 2)
    assert torch.equal(mimi.encode(audio), expected)


def test_encode_equals_transformers_at_whole_frames(pair):
    hf, mimi = pair
    audio = torch.randn(2, 25 * mimi.config.frame_samples) * 0.3
    assert torch.equal(mimi.encode(audio), hf_encode(hf, audio))
    assert torch.equal(mimi.encode(audio, 5), hf_encode(hf, audio, 5))


@pytest.mark.parametrize("chunks", [[1], [2, 5, 1]])
def test_encoder_stream_equals_whole(pair, chunks):
    _, mimi = pair
    audio = torch.randn(2, 20 * mimi.config.frame_samples) * 0.3
    state, rest, parts, chunks = mimi.init_encoder_state(2), audio, [], list(chunks)
    while rest.shape[1]:
        size = chunks.pop(0) if len(chunks) > 1 else chunks[0]
        size *= mimi.config.frame_samples
        parts.append(mimi.encode_step(rest[:, :size], state))
        rest = rest[:, size:]
    assert torch.equal(torch.cat(parts, dim=1), mimi.encode(audio))


@pytest.mark.slow
def test_full_size(tmp_path):
    from transformers import MimiConfig

    defaults = MimiConfig().to_dict()
    hf = save_hf_mimi(tmp_path, **{name: defaults[name] for name in TINY})
    mimi = load_mimi(tmp_path)
    codes = random_codes(1, 4, 32, 2048)
    expected = hf_decode(hf, codes)
    assert mimi.config.frame_samples == 1920
    assert_same_audio(mimi.decode(codes), expected)
    assert_same_audio(stream(mimi, codes, [1]), expected)
    audio = torch.randn(1, 3 * 1920) * 0.3
    assert torch.equal(mimi.encode(audio), hf_encode(hf, audio))


def test_codes_outside_a_codebook_are_clamped(pair):
    hf, mimi = pair
    codes = random_codes(1, 6)
    codes[0, 1] = torch.tensor([64, 65, 66, 70, 1 << 40, 63, -1, -(1 << 40)])
    assert_same_audio(mimi.decode(codes), hf_decode(hf, codes.clamp(0, 63)))


@pytest.mark.slow
@pytest.mark.parametrize("chunks", [[1], [3], [1, 7, 0, 2, 11]])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_stream_equals_the_whole_decode_bit_for_bit(tmp_path, precision, chunks):
    """In any batch, too. With 32 columns, some matrices are packed in int8."""
    save_hf_mimi(tmp_path)
    mimi = load_mimi(tmp_path, precision)
    codes = random_codes(3, 25)
    whole = mimi.decode(codes)
    for row, expected in zip(codes, whole, strict=True):
        assert torch.equal(stream(mimi, row[None], chunks)[0], expected)


@pytest.mark.parametrize(("precision", "least_db"), [("bfloat16", 35), ("int8", 30)])
def test_lower_precision_is_near_float32(tmp_path, precision, least_db):
    save_hf_mimi(tmp_path, hidden_size=64, intermediate_size=96, upsample_groups=64)
    exact, mimi = load_mimi(tmp_path), load_mimi(tmp_path, precision)
    matrices = [w.dtype for w in mimi.decoder.transformer.weights if w.dtype != torch.float32]
    expected_dtype = torch.int8 if precision == "int8" else torch.bfloat16
    assert matrices == [expected_dtype] * 4
    codes = random_codes(2, 40)
    expected = exact.decode(codes)
    error = mimi.decode(codes) - expected
    noise_db = 10 * torch.log10(expected.square().mean() / error.square().mean()).item()
    assert least_db < noise_db < 80
    audio = torch.randn(2, 16 * 9) * 0.3
    assert torch.equal(mimi.encode(audio), exact.encode(audio))


def test_unknown_precision_is_named(tmp_path):
    save_hf_mimi(tmp_path)
    with pytest.raises(ValueError, match="precision must be float32 or bfloat16 or int8, got int4"):
        load_mimi(tmp_path, "int4")


def test_decoding_is_causal(pair):
    _, mimi = pair
    codes = random_codes(1, 18)
    changed = codes.clone()
    changed[0, 11] = (codes[0, 11] + 1) % 64
    before, after = mimi.decode(codes), mimi.decode(changed)
    split = 11 * mimi.config.frame_samples
    assert torch.equal(before[:, :split], after[:, :split])
    assert not torch.equal(before[:, split:], after[:, split:])


def test_empty_inputs(pair):
    _, mimi = pair
    assert mimi.decode(random_codes(2, 0)).shape == (2, 0)
    assert mimi.decode(random_codes(0, 3)).shape == (0, 3 * mimi.config.frame_samples)
    codes = mimi.encode(torch.zeros(2, 0), 4)
    assert codes.shape == (2, 0, 4)
    assert codes.dtype == torch.int64


def test_wrong_shapes_are_named(pair):
    _, mimi = pair
    with pytest.raises(ValueError, match="codes must be"):
        mimi.decode(random_codes(1, 2, 9))
    with pytest.raises(ValueError, match="codes must be"):
        mimi.decode(random_codes(1, 2)[0])
    with pytest.raises(ValueError, match="codes has 2 rows, its state 1"):
        mimi.decode_step(random_codes(2, 1), mimi.init_state())
    with pytest.raises(ValueError, match="audio must be"):
        mimi.encode(torch.zeros(1, 1, 16))
    with pytest.raises(ValueError, match="num_codebooks"):
        mimi.encode(torch.zeros(1, 16), 9)
    with pytest.raises(ValueError, match="audio must be"):
        mimi.encode_step(torch.zeros(1, 3), mimi.init_encoder_state())
