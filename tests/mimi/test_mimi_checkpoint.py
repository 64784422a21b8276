"""Finding codec checkpoints, mapping their tensor names, checking their contents."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from mimi_oracles import (
    TINY,
    assert_same_audio,
    hf_decode,
    moshi_file_tensors,
    random_codes,
    random_moshi_mimi,
    save_hf_mimi,
    write_json,
)
from vox_serve.mimi import MimiConfig, find_codec_file, load_mimi, mimi_from_checkpoint

EIGHT_HEADS = {"num_attention_heads": 8, "num_key_value_heads": 8, "sliding_window": 250}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("hf")
    save_hf_mimi(path)
    return path


@pytest.fixture
def tensors(folder):
    return load_file(folder / "model.safetensors")


def test_kyutai_defaults():
    config = MimiConfig.from_json({"model_type": "mimi"})
    assert config == MimiConfig()
    assert (config.frame_samples, config.latent_stride, config.head_dim) == (1920, 2, 64)


@pytest.mark.parametrize(
    "settings",
    [
        {"use_causal_conv": False},
        {"trim_right_ratio": 0.5},
        {"audio_channels": 2},
        {"pad_mode": "reflect"},
        {"hidden_act": "mish"},
        {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}},
        {"num_key_value_heads": 3},
        {"num_semantic_quantizers": 32},
        {"upsample_groups": 7},
        {"codebook_dim": 128},
        {"head_dim": 5},
        {"upsampling_ratios": [4, 0]},
        {"sliding_window": 0},
        {"frame_rate": 100.0},
        {"decoder_config": None},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_unsupported_settings_are_named(settings):
    name = next(iter(settings)).replace("rope_parameters", "rope_type")
    with pytest.raises(ValueError, match=name):
        MimiConfig.from_json(settings)


def test_missing_tensor_is_named(tensors):
    del tensors["decoder_transformer.layers.1.mlp.fc2.weight"]
    with pytest.raises(
        ValueError, match=r"decoder_transformer\.layers\.1\.mlp\.fc2\.weight is mis"
    ):
        mimi_from_checkpoint(tensors, TINY)


def test_wrong_shape_is_named(tensors):
    tensors["encoder.layers.0.conv.weight"] = torch.zeros(4, 1, 5)
    with pytest.raises(ValueError, match=r"encoder\.layers\.0\.conv\.weight is \[4, 1, 5\].*7\]"):
        mimi_from_checkpoint(tensors, TINY)


def test_layers_beyond_the_config_are_refused(tensors):
    with pytest.raises(ValueError, match=r"coder_transformer\.layers\.1\..* beyond the config"):
        mimi_from_checkpoint(tensors, {**TINY, "num_hidden_layers": 1})


def test_fewer_codebooks_than_the_file_has(folder, tensors):
    mimi = mimi_from_checkpoint(tensors, {**TINY, "num_quantizers": 5})
    codes = random_codes(1, 4, 5)
    assert torch.equal(mimi.decode(codes), load_mimi(folder).decode(codes))


def test_decoder_alone(folder, tensors):
    decoder = {
        name: tensor
        for name, tensor in tensors.items()
        if not name.startswith(("encoder", "downsample")) and "input_proj" not in name
    }
    mimi = mimi_from_checkpoint(decoder, {**TINY, "encoder_config": None})
    codes = random_codes(1, 4)
    assert torch.equal(mimi.decode(codes), load_mimi(folder).decode(codes))
    with pytest.raises(ValueError, match="no encoder"):
        mimi.encode(torch.zeros(1, 16))


def test_bfloat16_files_compute_in_float32(tensors):
    rounded = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    widened = {name: tensor.float() for name, tensor in rounded.items()}
    codes = random_codes(1, 4)
    decoded = [mimi_from_checkpoint(t, TINY).decode(codes) for t in (rounded, widened)]
    assert torch.equal(*decoded)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_residual_layers": 2, "use_conv_shortcut": True, "kernel_size": 5},
        {"frame_rate": 20.0, "upsampling_ratios": [5, 2], "last_kernel_size": 1},
        {"codebook_dim": 32, "vector_quantization_hidden_dimension": 32, "upsample_groups": 4},
    ],
    ids=["units", "four_steps_a_frame", "no_projections"],
)
def test_sizes_from_the_tensors(tmp_path, settings):
    hf = save_hf_mimi(tmp_path, **EIGHT_HEADS, **settings)
    expected = load_mimi(tmp_path).config
    (tmp_path / "config.json").unlink()
    (tmp_path / "model.safetensors").rename(tmp_path / "mimi.safetensors")
    mimi = load_mimi(tmp_path)
    # Tensor shapes give samples per frame, not rates.
    assert mimi.config.frame_samples == expected.frame_samples
    codes = random_codes(1, 9)
    assert_same_audio(mimi.decode(codes), hf_decode(hf, codes))


def test_choice_of_file_in_a_folder(tmp_path, folder, tensors):
    assert find_codec_file(folder) == folder / "model.safetensors"
    csm = {"model_type": "csm", "codec_config": {**TINY, "model_type": "mimi"}}
    write_json(tmp_path / "config.json", csm)
    save_file({"lm_head.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    assert find_codec_file(tmp_path) is None
    with pytest.raises(FileNotFoundError, match="no Mimi codec in"):
        load_mimi(tmp_path)
    codes = random_codes(1, 3)
    for name in ("tokenizer-e351c8d8-checkpoint125.safetensors", "mimi.safetensors"):
        save_file(tensors, tmp_path / name)
        assert find_codec_file(tmp_path) == tmp_path / name
        assert torch.equal(load_mimi(tmp_path).decode(codes), load_mimi(folder).decode(codes))
        assert torch.equal(
            load_mimi(tmp_path / name).decode(codes), load_mimi(folder).decode(codes)
        )


def test_bad_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.safetensors"):
        load_mimi(tmp_path / "absent.safetensors")
    broken = tmp_path / "mimi.safetensors"
    broken.write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match=r"mimi\.safetensors is not a safetensors file"):
        load_mimi(tmp_path)
    torch.save({}, tmp_path / "mimi.pt")
    with pytest.raises(ValueError, match=r"mimi\.pt is not a safetensors file"):
        load_mimi(tmp_path / "mimi.pt")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        load_mimi(tmp_path)


def test_moshi_names_equal_transformers(tmp_path):
    pytest.importorskip("moshi", reason="moshi, the second oracle, is not installed")
    from transformers import MimiConfig as HfConfig
    from transformers import MimiModel

    moshi = random_moshi_mimi()
    save_file(moshi_file_tensors(moshi), tmp_path / "mimi.safetensors")
    write_json(tmp_path / "config.json", {"codec_config": TINY})
    mimi = load_mimi(tmp_path)

    # Our names are transformers' names: its own loader must find every tensor.
    from vox_serve.mimi import checkpoint

    named = {
        checkpoint._hf_name(name): tensor for name, tensor in moshi_file_tensors(moshi).items()
    }
    named = checkpoint._split_in_proj(named, mimi.config)
    hf_folder = tmp_path / "hf"
    hf_folder.mkdir()
    save_file({name: t.contiguous() for name, t in named.items()}, hf_folder / "model.safetensors")
    write_json(hf_folder / "config.json", json.loads(HfConfig(**TINY).to_json_string()))
    hf, report = MimiModel.from_pretrained(hf_folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    codes = random_codes(2, 12)
    assert_same_audio(mimi.decode(codes), hf_decode(hf.eval(), codes))
