"""Checkpoints of unknown origin: small ones take little memory, and one line names file and key."""

import json
import os
import struct
import zipfile
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints import build_tiny
from limits import refusal
from vox_serve.context_file import load_context
from vox_serve.json_file import MAX_JSON_BYTES, JsonError, parse_json
from vox_serve.loading import load_engine
from vox_serve.memory import memory_bytes
from vox_serve.mimi import MimiConfig, load_mimi
from vox_serve.model_config import CsmConfig
from vox_serve.prompt import PromptBuilder, Segment
from vox_serve.weight_cache import WeightCache, folder_stamps
from vox_serve.weights import load_checkpoint

HUGE = 10**9


@pytest.fixture
def folder(tmp_path) -> Path:
    return build_tiny().write(tmp_path / "model")


def set_key(folder: Path, key: str, value) -> None:
    path = folder / "config.json"
    settings = json.loads(path.read_text())
    *parents, name = key.split(".")
    part = settings
    for parent in parents:
        part = part[parent]
    part[name] = value
    path.write_text(json.dumps(settings))


SIZES = [
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "vocab_size",
    "text_vocab_size",
    "num_codebooks",
]
DEPTH_SIZES = [
    f"depth_decoder_config.{key}" for key in SIZES if key != "text_vocab_size" and "pos" not in key
]


@pytest.mark.slow
@pytest.mark.parametrize("value", [HUGE, 3 * HUGE, 10**400, "lots", True, 1.5, [1], -1])
@pytest.mark.parametrize("key", [*SIZES, *DEPTH_SIZES])
def test_an_absurd_size_names_file_and_key(folder, key, value):
    set_key(folder, key, value)
    said = refusal(load_engine, folder, context="none", weight_cache="none")
    assert "config.json" in said
    # A key that another one must divide or equal may be named beside it.
    assert key.rpartition(".")[2].replace("num_key_value_heads", "num_") in said.replace(
        "num_kv_heads", "num_"
    )


@pytest.mark.parametrize("key", ["num_hidden_layers", "text_vocab_size", "max_position_embeddings"])
def test_the_original_format_is_bounded_too(tmp_path, key):
    folder = build_tiny().write(tmp_path / "model", "original", codec="mimi")
    set_key(folder, key, HUGE)
    assert key in refusal(load_engine, folder, context="none")


def test_an_original_config_that_does_not_fit_names_the_default(tmp_path):
    folder = build_tiny().write(tmp_path / "model", "original", codec="mimi")
    (folder / "config.json").write_text("{}")
    said = refusal(load_checkpoint, folder, torch.float32)
    assert "config.json: text_vocab_size is 128256 (by default), but the tensors in" in said


@pytest.mark.parametrize("value", ["1e400", "-1e400", "NaN", "Infinity", "0", "-1", '"1"', "true"])
@pytest.mark.parametrize("key", ["rms_norm_eps", "depth_decoder_config.rms_norm_eps"])
def test_numbers_that_are_none_name_the_key(folder, key, value):
    set_key(folder, key, "HERE")
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"HERE"', value))
    said = refusal(load_checkpoint, folder, torch.float32)
    assert "config.json" in said
    assert key in said


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"rope_theta": 1e300}, "rope_theta"),
        ({"rope_theta": 1e-300}, "rope_theta"),
        ({"factor": 0.0}, "factor"),
        ({"factor": 10**400}, "factor"),
        ({"high_freq_factor": 0.5}, "high_freq_factor"),
        ({"low_freq_factor": True}, "low_freq_factor"),
        ({"original_max_position_embeddings": 10**12}, "original_max_position_embeddings"),
        ({"rope_type": ["llama3"]}, "rope_type"),
    ],
)
def test_rope_is_bounded(change, named):
    settings = json.loads(json.dumps(build_tiny().config))
    settings["rope_parameters"] |= change
    said = refusal(CsmConfig.from_json, settings)
    assert "config.json: rope_parameters." in said
    assert named in said


def test_a_context_beyond_memory_is_refused(folder, monkeypatch):
    monkeypatch.setattr("vox_serve.loading.memory_bytes", lambda: 100_000)
    said = refusal(load_engine, folder, context="none")
    assert "config.json: max_position_embeddings 256 needs " in said


def test_memory_is_that_of_the_container(tmp_path):
    assert memory_bytes(tmp_path) > 1 << 28
    for name, text in (("memory.max", "max\n"), ("memory/memory.limit_in_bytes", "12345\n")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert memory_bytes(tmp_path) == 12345


def test_a_config_of_wrong_types_names_a_key():
    """Every key with every wrong type: a ValueError, or the value is not used."""
    settings = build_tiny().config
    for where in ((), ("depth_decoder_config",), ("rope_parameters",)):
        part = settings
        for name in where:
            part = part[name]
        for key in part:
            for value in (None, [], {}, "x", -1, 0.5, True, [[1]], {"a": 1}, 10**400):
                changed = json.loads(json.dumps(settings))
                target = changed
                for name in where:
                    target = target[name]
                target[key] = value
                with suppress(ValueError):
                    CsmConfig.from_json(changed)


CODEC_SIZES = [
    ("hidden_size", HUGE),
    ("num_filters", HUGE),
    ("kernel_size", HUGE),
    ("num_residual_layers", HUGE),
    ("num_hidden_layers", HUGE),
    ("num_quantizers", HUGE),
    ("codebook_size", HUGE),
    ("sliding_window", HUGE),
    ("sampling_rate", HUGE),
    ("sampling_rate", 1),
    ("frame_rate", 1e-9),
    ("frame_rate", 5e-324),
    ("upsampling_ratios", [HUGE] * 50),
    ("upsampling_ratios", [2] * HUGE.bit_length() * 1000),
    ("upsampling_ratios", ["8"]),
    ("upsampling_ratios", "8654"),
    ("hidden_size", "512"),
    ("num_attention_heads", 0),
    ("num_key_value_heads", 0),
    ("head_dim", 2.0),
    ("norm_eps", 0),
    ("norm_eps", 10**400),
    ("rope_parameters", {"rope_theta": "x"}),
    ("rope_parameters", "x"),
    ("upsample_groups", 0),
    ("use_conv_shortcut", 1),
]


@pytest.mark.slow
@pytest.mark.parametrize(("key", "value"), CODEC_SIZES)
def test_an_absurd_codec_names_the_key(folder, key, value):
    set_key(folder, f"codec_config.{key}", value)
    said = refusal(load_engine, folder, context="none")
    names = {key, key.replace("_parameters", "")} | {"tensor"}
    assert any(name in said for name in names)


def test_every_key_of_a_codec_with_every_wrong_type():
    settings = build_tiny().config["codec_config"]
    for key in settings:
        for value in ([], {}, "x", -1, 0.5, True, [[1]], 10**400, float("nan")):
            with suppress(ValueError):
                MimiConfig.from_json(settings | {key: value})


def test_dilations_are_bounded():
    """They determine the state of a stream, and no tensor's shape does."""
    said = refusal(MimiConfig, dilation_growth_rate=HUGE, num_residual_layers=2)
    assert "dilation_growth_rate" in said


BAD_JSON = [
    (b"[" * 100_000, "nests too deeply"),
    (b'{"a":' * 500 + b"1" + b"}" * 500, "nests too deeply"),
    (b'{"model_type": "csm", "model_type": "x"}', "'model_type' is given twice"),
    (b'{"a": {"b": 1, "b": 2}}', "'b' is given twice"),
    (b'{"a": [1, {"b": 1e400}]}', "a.b: the number is not finite"),
    (b'{"a": [NaN]}', "a: the number is not finite"),
    (b'{"a": ' + b"9" * 5000 + b"}", "digits"),
    (b" " * (MAX_JSON_BYTES + 1), "longer than"),
    (b"\xff{}", "utf-8"),
    (b"", "Expecting value"),
]


@pytest.mark.parametrize(("data", "said"), BAD_JSON)
def test_bad_json_says_so(data, said):
    if len(data) <= MAX_JSON_BYTES:
        assert said in refusal(parse_json, data)


@pytest.mark.slow
@pytest.mark.parametrize(("data", "said"), BAD_JSON)
@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "generation_config.json",
        "tokenizer_config.json",
        "model.safetensors.index.json",
    ],
)
def test_bad_json_names_its_file(folder, name, data, said):
    (folder / name).write_bytes(data)
    message = refusal(load_engine, folder, context="none")
    assert name in message
    assert said in message


@pytest.mark.parametrize(("data", "said"), BAD_JSON)
def test_a_bad_context_names_its_file(tmp_path, mimi, config, data, said):
    path = tmp_path / "context.json"
    path.write_bytes(data)
    message = refusal(load_context, path, mimi, config)
    assert "context.json: " in message
    assert said in message


@pytest.mark.parametrize(("data", "said"), BAD_JSON)
def test_a_bad_codec_config_names_its_file(tmp_path, data, said):
    (tmp_path / "config.json").write_bytes(data)
    (tmp_path / "mimi.safetensors").write_bytes(b"")
    message = refusal(load_mimi, tmp_path)
    assert "config.json" in message
    assert said in message


def test_a_bad_record_of_the_weight_cache_is_no_cache(folder):
    sources = [folder / "config.json"]
    stamps = folder_stamps(folder)
    cache = WeightCache([folder / "cache"], "name", (1,), sources, stamps)
    assert cache.save({"a": torch.ones(3)}) is not None
    for data, _ in BAD_JSON:
        (folder / "cache" / "name.json").write_bytes(data)
        assert WeightCache([folder / "cache"], "name", (1,), sources, stamps).load() is None


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
@pytest.mark.parametrize("kind", ["fifo", "/dev/zero", "folder"])
def test_a_special_file_is_refused(folder, name, kind):
    """A pipe would block for ever, and /dev/zero never ends."""
    path = folder / name
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(kind)
    assert name in refusal(load_engine, folder, context="none")


def header(length: int, text: bytes = b"") -> bytes:
    return struct.pack("<Q", length) + text


def one_tensor(dtype: str = "F32", shape=(2,), offsets=(0, 8), data: bytes = bytes(8)) -> bytes:
    text = json.dumps({"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}).encode()
    return header(len(text), text) + data


BAD_SAFETENSORS = [
    b"",
    b"short",
    header(2**63),
    header(2**64 - 1, b"{}"),
    header(200 << 20, b"{}"),
    header(5, b"{}"),
    header(2, b"[]"),
    one_tensor(offsets=(0, 16)),
    one_tensor(offsets=(4, 12)),
    one_tensor(offsets=(8, 0)),
    one_tensor(offsets=(0, 2**64 - 1)),
    one_tensor(shape=(2**62, 8)),
    one_tensor(shape=(2**63, 2)),
    one_tensor(shape=(-1,)),
    one_tensor(dtype="F31"),
    one_tensor(data=bytes(4)),
    header(100_000, b'{"a":' + b"[" * 99_995),
]


@pytest.mark.parametrize("data", BAD_SAFETENSORS)
def test_bad_safetensors_name_their_file(folder, tmp_path, data):
    (folder / "model.safetensors").write_bytes(data)
    assert "model.safetensors" in refusal(load_engine, folder, context="none")
    (tmp_path / "mimi.safetensors").write_bytes(data)
    assert "mimi.safetensors" in refusal(load_mimi, tmp_path)


def test_a_long_header_is_refused_before_it_is_parsed(folder):
    data = header(17 << 20, b" " * (17 << 20))
    (folder / "model.safetensors").write_bytes(data)
    assert "its header is longer than" in refusal(load_engine, folder, context="none")


def test_tensors_without_elements(folder):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name in ("lm_head.weight", "backbone_model.layers.0.self_attn.q_proj.weight"):
        save_file(tensors | {name: torch.zeros(0, 5)}, path)
        assert "config.json" in refusal(load_checkpoint, folder, torch.float32)


def test_a_pickled_view_is_as_large_as_its_file(tmp_path):
    """Strides of 0 give a tensor of any shape in a few bytes, which config.json may agree with."""
    folder = build_tiny().write(tmp_path / "model", "pickle", codec="mimi")
    tensors = torch.load(folder / "ckpt.pt")
    tensors["text_embeddings.weight"] = torch.zeros(1, 1).expand(10**9, 64)
    torch.save(tensors, folder / "ckpt.pt")
    set_key(folder, "text_vocab_size", 10**9)
    said = refusal(load_checkpoint, folder, torch.float32, allow_pickle=True)
    assert "ckpt.pt: tensor text_embeddings.weight is larger than the file" in said


def test_a_compressed_pickle_is_refused(tmp_path):
    folder = build_tiny().write(tmp_path / "model", "pickle", codec="mimi")
    with zipfile.ZipFile(folder / "ckpt.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(20 << 20))
    said = refusal(load_checkpoint, folder, torch.float32, allow_pickle=True)
    assert "a part of it is compressed" in said


def tokenizer_with(**parts) -> bytes:
    return json.dumps(json.loads(build_tiny().tokenizer.to_str()) | parts).encode()


def nested(depth: int) -> dict:
    part = {"type": "Sequence", "pretokenizers": []}
    for _ in range(depth):
        part = {"type": "Sequence", "pretokenizers": [part]}
    return part


def split(pattern: str) -> dict:
    pattern = {"Regex": pattern}
    return {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}


def test_bad_tokenizers_name_their_file(folder, config):
    replace = {"type": "Replace", "pattern": {"String": "a"}, "content": "b" * 1000}
    for data, said in (
        (tokenizer_with(pre_tokenizer=nested(200)), "recursion limit"),
        (tokenizer_with(pre_tokenizer=split("(" * 500)), ""),
        (tokenizer_with(pre_tokenizer=split("x" * 20_000)), "Regex is longer than"),
        (tokenizer_with(normalizer=replace), "content is longer than"),
        (b"[" * 100_000, ""),
        (b"{}", ""),
        (b"\xff\x00", ""),
    ):
        (folder / "tokenizer.json").write_bytes(data)
        message = refusal(PromptBuilder.from_folder, folder, config)
        assert "tokenizer.json cannot be read as a tokenizer" in message
        assert said in message


def test_a_tokenizer_beyond_the_bound_is_not_read(folder, config):
    os.truncate(folder / "tokenizer.json", 10 << 30)  # a sparse file
    assert "longer than" in refusal(PromptBuilder.from_folder, folder, config)


def test_a_regular_expression_that_explodes_is_an_error(folder, config):
    (folder / "tokenizer.json").write_bytes(tokenizer_with(pre_tokenizer=split("(a+)+$")))
    prompts = PromptBuilder.from_folder(folder, config)
    assert "tokenizer fails" in refusal(prompts.tokens, Segment(0, "a" * 40 + "b"))
    assert prompts.tokens(Segment(0, "hi"))


def test_a_long_key_of_many_values_takes_little_memory():
    values = ", ".join(f'"a{i}": 1.5' for i in range(20_000))
    data = f'{{"{"k" * 100_000}": {{{values}, "z": NaN}}}}'.encode()
    assert "not finite" in refusal(parse_json, data)


def test_json_that_is_fine():
    assert parse_json(b'{"a": [1, 2.5, null, "\\u00e9"]}') == {"a": [1, 2.5, None, "é"]}
    with pytest.raises(JsonError):
        parse_json(b'{"a": 1} x')
