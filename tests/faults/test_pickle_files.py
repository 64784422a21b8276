"""Pickled checkpoints of unknown origin: nothing in them is run, and they take little memory."""

import argparse
import os
import pickle
import struct
import sys
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch

from limits import memory_limit, refusal
from vox_serve.checkpoint import TensorFiles
from vox_serve.pickled_tensors import MAX_READ_BYTES

GLOBAL = b"c%s\n%s\n"
BYTEARRAY = GLOBAL % (b"builtins", b"bytearray")
ENCODE = GLOBAL % (b"_codecs", b"encode")
ORDERED = GLOBAL % (b"collections", b"OrderedDict")
REBUILD = GLOBAL % (b"torch._utils", b"_rebuild_tensor_v2")
WRAPPED = GLOBAL % (b"torch._tensor", b"_rebuild_from_type_v2")
FLOATS = GLOBAL % (b"torch", b"FloatStorage")


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def storage(part: str, kind: bytes = FLOATS) -> bytes:
    """A storage by its persistent id, as torch.save writes it."""
    return b"(" + text("storage") + kind + text(part) + text("cpu") + b"K\x04tQ"


def tensor(part: str = "0", offset: bytes = b"K\x00", shape: bytes = b"K\x04\x85") -> bytes:
    return REBUILD + b"(" + storage(part) + offset + shape + b"K\x01\x85\x89" + ORDERED + b")RtR"


def state(value: bytes, name: str = "a") -> bytes:
    """A dict of one item."""
    return b"\x80\x02}" + text(name) + value + b"s."


def written(path, pickled: bytes, parts=None):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        for name, data in (parts or {"data/0": bytes(16)}).items():
            archive.writestr(f"archive/{name}", data)
    return path


def opened(path):
    return TensorFiles([path])


def test_values_are_those_of_torch(tmp_path):
    whole = torch.randn(6, 8)
    tensors = {
        "whole": whole,
        "tied": whole,
        "part": whole[2:4, 1:5],
        "transposed": whole.T,
        "parameter": torch.nn.Parameter(torch.randn(3)),
        "half": torch.randn(2, 3).half(),
        "bfloat16": torch.randn(5).bfloat16(),
        "double": torch.randn(5).double(),
        "scalar": torch.tensor(3.0),
        "empty": torch.empty(0, 4),
        "module.weight": torch.nn.Linear(3, 2).weight,
    }
    state = OrderedDict(tensors)
    state._metadata = OrderedDict({"": {"version": 1}})
    trainer = {
        "model": state,
        "args": argparse.Namespace(rate=1e-3),
        "scalar": np.float64(1.5),
        "rng": [torch.get_rng_state(), 7, 2**80, None, True, (1, "x", b"bytes")],
        "optimizer": {"state": {0: {"step": torch.ones(1)}}, "param_groups": [{"lr": 0.1}]},
    }
    for value in (state, tensors, trainer):
        torch.save(value, tmp_path / "a.pt")
        files = opened(tmp_path / "a.pt")
        assert files.names == set(tensors)
        for name, expected in tensors.items():
            got = files.read(name)
            assert got.dtype == expected.dtype
            assert torch.equal(got, expected.detach()), name
    torch.save({"a": torch.ones(2, dtype=torch.int64)}, tmp_path / "a.pt")
    assert "has dtype torch LongStorage, which is not" in refusal(
        opened(tmp_path / "a.pt").read, "a"
    )


class Payload:
    """Unpickled, it would make a folder."""

    def __reduce__(self):
        return os.mkdir, ("ran",)


def test_nothing_is_called_or_imported(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": torch.ones(3), "b": Payload()}, "a.pt")
    assert opened(tmp_path / "a.pt").names == {"a"}
    assert not (tmp_path / "ran").exists()
    stranger = GLOBAL % (b"antigravity", b"fly") + b")R"
    written(
        tmp_path / "b.pt", b"\x80\x02}" + text("a") + tensor() + b"s" + text("b") + stranger + b"s."
    )
    assert opened(tmp_path / "b.pt").read("a").tolist() == [0] * 4
    assert "antigravity" not in sys.modules


TIMES = 150_000
COLLIDING = 2**61 - 1  # its multiples have one hash
HOSTILE = {
    "bytes": (state(BYTEARRAY + b"\x8a\x06" + (2**40).to_bytes(6, "little") + b"\x85R"), "no dict"),
    # A long text and a long list once, which hundreds of thousands of calls would copy.
    "encode": (
        b"\x80\x02]"
        + text("x" * 10**6)
        + b"\x85q\x00"
        + ENCODE
        + b"q\x01"
        + b"h\x01h\x00Ra" * TIMES
        + b".",
        "no dict",
    ),
    "sets": (
        b"\x80\x02]("
        + b"K\x01" * TIMES
        + b"t\x85q\x00"
        + GLOBAL % (b"torch", b"Size")
        + b"q\x01("
        + b"h\x01h\x00R" * TIMES
        + b"e.",
        "no dict",
    ),
    "dicts": (b"\x80\x02](" + b"}" * 2_000_000 + b"e.", "no dict"),
    "colliding keys": (
        b"\x80\x02}("
        + b"".join(b"\x8a\x0c%bN" % (i * COLLIDING).to_bytes(12, "little") for i in range(120_000))
        + b"u.",
        "no dict",
    ),
    "doubled lists": (b"\x80\x02]q\x00" + b"]q\x00(h\x00h\x00e" * 99 + b".", "no dict"),
    "memo": (b"\x80\x02Nr\xff\xff\xff\xff.", "no dict"),
    "text": (b"\x80\x02X\xff\xff\xff\xff.", "cannot be read as plain tensors"),
    "long text": (b"\x80\x04\x8d" + b"\xff" * 8 + b".", "cannot be read as plain tensors"),
    "number": (b"\x80\x02\x8b\xff\xff\xff\x7f.", "cannot be read as plain tensors"),
    "empty": (b"", "cannot be read as plain tensors"),
    "no end": (b"\x80\x02}", "cannot be read as plain tensors"),
    "no mark": (b"\x80\x02t.", "cannot be read as plain tensors"),
    "no value": (b"\x80\x02.", "cannot be read as plain tensors"),
    "no memo": (b"\x80\x02h\x00.", "cannot be read as plain tensors"),
    "extension": (b"\x80\x02\x82\x01.", "its pickle has EXT1, which torch.save does not write"),
    "instance": (b"\x80\x00(ios\nsystem\n.", "its pickle has INST"),
    "older": (b"\x80\x00(dp0\n.", "its pickle has DICT"),
    "odd items": (b"\x80\x02}(" + text("a") + b"u.", "cannot be read as plain tensors"),
    "storage of none": (state(b"(" + text("storage") + b"NNNNtQ"), "a storage without a kind"),
    "storage of lists": (
        state(b"(" + text("storage") + b"]q\x00" + b"]q\x00(h\x00h\x00e" * 99 + b"NNNtQ"),
        "a storage without a kind",
    ),
    "no arguments": (state(REBUILD + b")R"), "cannot be read as plain tensors"),
    "argument": (state(REBUILD + b"K\x01R"), "cannot be read as plain tensors"),
    "negative offset": (state(tensor(offset=b"J\xff\xff\xff\xff")), "without a storage, shape"),
    "shape of text": (state(tensor(shape=text("4"))), "without a storage, shape or strides"),
    "two sizes": (state(tensor(shape=b"K\x02K\x02\x86")), "without a storage, shape or strides"),
    "many sizes": (state(tensor(shape=b"(" + b"K\x01" * 99 + b"t")), "without a storage"),
    "long": (state(tensor(shape=b"K\x05\x85")), "tensor a is larger than its storage"),
    "beyond": (state(tensor(offset=b"K\x01")), "tensor a is larger than its storage"),
    "huge": (state(tensor(shape=b"\x8a\x08" + b"\xff" * 7 + b"\x7f\x85")), "larger than the file"),
    "other part": (state(tensor("1")), "tensor a is larger than its storage"),
    "outside": (state(tensor("../../etc/passwd")), "tensor a is larger than its storage"),
    "wrapped deeply": (
        state((WRAPPED + b"q\x00" + b"N" + b"h\x00N" * 9_000) + b")" + b"\x87" * 9_000 + b"R"),
        "cannot be read as plain tensors",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_pickle_is_one_line(tmp_path, name):
    pickled, reason = HOSTILE[name]
    path = written(tmp_path / "hostile.pt", pickled)
    said = refusal(opened, path)
    assert str(path) in said
    assert reason in said


def test_a_long_pickle_is_not_read(tmp_path):
    path = written(tmp_path / "a.pt", b"\x80\x02]" + b"N0" * MAX_READ_BYTES + b".")
    assert f"exceeds {MAX_READ_BYTES} bytes" in refusal(opened, path)


def test_a_long_list_of_parts_is_not_read(tmp_path):
    path = tmp_path / "a.pt"
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(20_000):
            archive.writestr(f"{i}" + "x" * 100, b"")
    with memory_limit(256 << 20):
        assert f"exceeds {MAX_READ_BYTES} bytes" in refusal(opened, path)


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.9, 0.999])
def test_truncated(tmp_path, share):
    path = tmp_path / "a.pt"
    torch.save({"a": torch.randn(100, 100)}, path)
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    assert f"{path} cannot be read as plain tensors: " in refusal(opened, path)


def test_other_files(tmp_path):
    path = tmp_path / "a.pt"
    torch.save({"a": torch.ones(3)}, path, _use_new_zipfile_serialization=False)
    assert "cannot be read as plain tensors: File is not a zip file" in refusal(opened, path)
    path.write_bytes(pickle.dumps({"a": 1}))
    assert "cannot be read as plain tensors: File is not a zip file" in refusal(opened, path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/b", b"")
    assert "it has no data.pkl: torch.save did not write it" in refusal(opened, path)
    written(path, state(tensor()), {"data/0": bytes(16), "byteorder": b"big"})
    assert "it is not little-endian" in refusal(opened, path)
    torch.save([torch.ones(3)], path)
    assert "it holds no dict of tensors" in refusal(opened, path)
