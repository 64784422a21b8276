"""GGUF files of unknown origin: one line names the file, and they take little memory."""

import re
import struct
from pathlib import Path

import pytest
import torch

from checkpoints import build_tiny
from gguf_files import write_crispasr
from limits import memory_limit, refusal
from vox_serve.checkpoint import TensorFiles
from vox_serve.gguf_header import MAX_HEADER_BYTES, MAX_STRINGS, read_header
from vox_serve.loading import load_engine
from vox_serve.weights import load_checkpoint

F32, F16, Q8_0, STRING, ARRAY, UINT32 = 0, 1, 8, 8, 9, 4
HUGE = 2**63


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def key(name: str, kind: int, data: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + data


def tensor(name: str, shape: tuple[int, ...], kind: int = F32, offset: int = 0) -> bytes:
    sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
    return text(name) + sizes + struct.pack("<IQ", kind, offset)


def file(
    tensors: list[bytes],
    keys: list[bytes] = (),
    data: int = 256,
    magic: bytes = b"GGUF",
    version: int = 3,
    num_tensors: int | None = None,
    num_keys: int | None = None,
) -> bytes:
    """A GGUF file of parts, and counts that may be others."""
    counts = (
        len(tensors) if num_tensors is None else num_tensors,
        len(keys) if num_keys is None else num_keys,
    )
    header = magic + struct.pack("<IQQ", version, *counts) + b"".join([*keys, *tensors])
    return header + bytes(-len(header) % 32) + bytes(data)


WHOLE = file([tensor("a", (8,)), tensor("b", (2, 4), offset=32)])
STRINGS = struct.pack("<IQ", STRING, HUGE)
HOSTILE = {
    "empty": (b"", "it ends within its header, after 0 bytes"),
    "cut": (WHOLE[:40], "it ends within its header, after 40 bytes"),
    "cut data": (WHOLE[:-200], "tensor 'b' ends at byte"),
    "magic": (file([], magic=b"GGML"), r"starts with b'GGML', not with b'GGUF'"),
    "safetensors": (struct.pack("<Q", 2) + b"{}", "it starts with"),
    "version 1": (file([], version=1), "its version is 1, not 2 or 3"),
    "big-endian": (file([], version=3 << 24), "big-endian files are not supported"),
    "tensors": (file([], num_tensors=HUGE), f"it has {HUGE} tensors; read are at most"),
    "keys": (file([], num_keys=HUGE), f"it has {HUGE} keys; read are at most"),
    "missing tensors": (file([tensor("a", (8,))], num_tensors=9, data=0), "ends within its header"),
    "key's name": (
        file([], [struct.pack("<Q", HUGE)]),
        f"a key has {HUGE} bytes; read are at most 1024",
    ),
    "string": (
        file([], [key("a", STRING, struct.pack("<Q", HUGE))]),
        "it ends within its header",
    ),
    "list of numbers": (
        file([], [key("a", ARRAY, struct.pack("<IQ", UINT32, HUGE))]),
        "it ends within its header",
    ),
    "list of strings": (
        file([], [key("a", ARRAY, STRINGS)]),
        f"its lists have more than {MAX_STRINGS} strings",
    ),
    "many lists of strings": (
        file(
            [],
            [key(f"{i}", ARRAY, struct.pack("<IQ", STRING, 9) + bytes(72)) for i in range(9)]
            + [key("z", ARRAY, struct.pack("<IQ", STRING, MAX_STRINGS))],
        ),
        "its lists have more than",
    ),
    "list of lists": (
        file([], [key("a", ARRAY, struct.pack("<IQ", ARRAY, 1))]),
        "key 'a' has a list of unsupported kind 9",
    ),
    "kind": (file([], [key("a", 99, b"")]), "key 'a' has a value of unknown kind 99"),
    "key twice": (file([], [key("a", UINT32, bytes(4))] * 2), "key 'a' is given twice"),
    "alignment 0": (
        file([], [key("general.alignment", UINT32, bytes(4))]),
        "general.alignment must be a multiple of 8",
    ),
    "alignment of text": (
        file([], [key("general.alignment", STRING, text("32"))]),
        "general.alignment must be a multiple of 8",
    ),
    "tensor's name": (
        file([struct.pack("<Q", HUGE)]),
        f"a tensor's name has {HUGE} bytes",
    ),
    "name of bytes": (file([tensor("a", (8,)).replace(b"a", b"\xff")]), "name is not UTF-8"),
    "name twice": (
        file([tensor("a", (8,)), tensor("a", (8,), offset=32)]),
        "tensor 'a' is given twice",
    ),
    "dimensions": (
        file([text("a") + struct.pack("<I", 2**31)]),
        f"tensor 'a' has {2**31} dimensions, not 0 to 4",
    ),
    "empty tensor": (file([tensor("a", (0, 4))]), r"tensor 'a' is empty: \[0, 4\]"),
    "huge tensor": (
        file([tensor("a", (2**63, 2**63, 2**63, 2**63))]),
        "tensor 'a' ends at byte [0-9]+, beyond the file's end",
    ),
    "type": (file([tensor("a", (8,), 5)]), "tensor 'a' has type 5, which is not supported"),
    "rows": (
        file([tensor("a", (4, 48), Q8_0)]),
        "tensor 'a' has rows of 48 values, but blocks of Q8_0 have 32",
    ),
    "offset": (file([tensor("a", (8,), offset=4)]), "tensor 'a' starts at 4, not on 32 bytes"),
    "offset outside": (
        file([tensor("a", (8,), offset=2**63)]),
        "tensor 'a' ends at byte [0-9]+, beyond the file's end",
    ),
    "overlap": (
        file([tensor("a", (16,)), tensor("b", (8,), offset=32)]),
        "tensors 'a' and 'b' overlap",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_header_is_one_line(tmp_path, name):
    data, reason = HOSTILE[name]
    path = tmp_path / "hostile.gguf"
    path.write_bytes(data)
    said = refusal(TensorFiles, [path])
    assert said.startswith(f"{path} cannot be read as GGUF: ")
    assert re.search(reason, said), said
    assert refusal(load_engine, str(path)) == said


def test_a_sound_header_is_read(tmp_path):
    path = tmp_path / "sound.gguf"
    path.write_bytes(WHOLE)
    assert list(read_header(path).tensors) == ["a", "b"]
    assert TensorFiles([path]).read("b").tolist() == [[0] * 4] * 2
    assert "holds no CSM: it has no tensors such as depth_decoder.codebooks_head.weight" in refusal(
        load_checkpoint, path, torch.float32
    )


def test_a_long_header_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "long.gguf"
    size = MAX_HEADER_BYTES + 100
    path.write_bytes(file([], [key("a", STRING, struct.pack("<Q", size))]))
    with open(path, "ab") as sparse:
        sparse.truncate(2 * size)
    assert f"its header is longer than {MAX_HEADER_BYTES} bytes" in refusal(read_header, path)


def test_blocks_are_decoded_in_little_memory_beyond_their_values(tmp_path):
    gguf = pytest.importorskip("gguf", reason="gguf is not installed (extra: gguf)")
    rows, columns = 8192, 2048
    path = tmp_path / "large.gguf"
    size = rows * columns // 32 * 34
    path.write_bytes(file([tensor("a", (rows, columns), Q8_0)], data=size))
    assert gguf.quants.dequantize
    with memory_limit(4 * rows * columns + (48 << 20)):
        assert TensorFiles([path]).read("a").shape == (rows, columns)


def test_two_names_for_one_tensor_are_refused(tmp_path):
    path = tmp_path / "twice.gguf"
    names = ["backbone.codebook0_head.weight", "lm_head.weight"]
    path.write_bytes(file([tensor(name, (8,), offset=32 * i) for i, name in enumerate(names)]))
    assert "tensors backbone.codebook0_head.weight and lm_head.weight are both" in refusal(
        TensorFiles, [path]
    )


@pytest.fixture
def whole(tmp_path) -> Path:
    pytest.importorskip("gguf", reason="gguf is not installed (extra: gguf)")
    return write_crispasr(tmp_path / "csm.gguf", build_tiny(rope="csm"), "f16")


def test_a_dtype_that_holds_no_weights_is_refused(whole):
    """The type of one tensor becomes 16-bit integers, which are as long."""
    data = bytearray(whole.read_bytes())
    at = data.index(b"depth.projection.weight") + len("depth.projection.weight") + 4 + 16
    assert data[at] == F16
    data[at] = 25
    whole.write_bytes(data)
    said = refusal(load_checkpoint, whole, torch.float32)
    assert "inputs_embeds_projector.weight in " in said
    assert "has dtype torch.int16, which is not supported" in said


def test_numbers_that_are_none_are_refused(whole):
    place = read_header(whole).tensors["backbone.blk.0.ffn_up.weight"]
    data = bytearray(whole.read_bytes())
    data[place.start : place.start + 2] = b"\x00\x7c"  # infinity
    whole.write_bytes(data)
    said = refusal(load_checkpoint, whole, torch.float32)
    assert "mlp.up_proj.weight" in said
    assert said.endswith("csm.gguf holds NaN or infinity")


@pytest.mark.parametrize(
    ("name", "value"),
    [("n_layers", 10**9), ("n_heads", 0), ("n_heads", 10**6), ("head_dim", 10**6), ("d_model", 7)],
)
@pytest.mark.parametrize("part", ["backbone", "depth"])
def test_absurd_sizes_name_the_file(whole, part, name, value):
    data = bytearray(whole.read_bytes())
    key_ = f"csm.{part}.{name}".encode()
    at = data.index(key_) + len(key_) + 4
    data[at : at + 4] = struct.pack("<I", value)
    whole.write_bytes(data)
    said = refusal(load_engine, str(whole), context="none")
    assert f"{whole} (no config.json beside it)" in said


@pytest.mark.parametrize("change", ["bias", "gone", "extra layer"])
def test_tensors_that_do_not_fit(whole, change):
    old = b"backbone.blk.1.attn_q.weight"
    new = {
        "bias": b"backbone.blk.1.attn_q.biases",
        "gone": b"backbone.blk_1.attn_q.weight",
        "extra layer": b"backbone.blk.7.attn_q.weight",
    }[change]
    whole.write_bytes(whole.read_bytes().replace(old, new))
    said = refusal(load_checkpoint, whole, torch.float32)
    assert "layers.1.self_attn.q_proj" in said or "layers.7.self_attn.q_proj" in said


@pytest.mark.parametrize(
    "change",
    [
        (b"mimi.decoder.model.0.conv2.weight", b"mimi.decoder.model.0.conv2.weighs"),
        (b"mimi.quantizer.rvq_first.input_proj", b"mimi.quantizer.rvq_first.inputXproj"),
        (b"mimi.dec_tfm.layers.0.attn.out_w", b"mimi.dec_tfm.layers.0.attn.out_x"),
    ],
)
def test_a_codec_that_lacks_a_tensor(whole, change):
    whole.write_bytes(whole.read_bytes().replace(*change))
    assert "Mimi checkpoint: tensor " in refusal(load_engine, str(whole), context="none")


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        (b"<|end_of_text|>", b"<|end_of_tent|>", "the tokenizer has no <|end_of_text|>"),
        (text("a"), text("b"), "tokenizer.ggml.tokens has a token twice"),
        (text("t h"), text("t %"), "cannot be read as a tokenizer: "),
    ],
)
def test_a_tokenizer_that_does_not_fit(whole, old, new, reason):
    data = whole.read_bytes()
    assert old in data
    whole.write_bytes(data.replace(old, new))
    assert reason in refusal(load_engine, str(whole), context="none")
