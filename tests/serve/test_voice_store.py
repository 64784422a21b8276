"""Voices in a folder and in memory: round trips, names, bounds, files of unknown origin."""

import json
import os
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.numpy import save

from vox_serve import voice_store
from vox_serve.prompt import Segment
from vox_serve.voice_file import Sizes, Voice, VoiceError, voice_from_bytes, voice_to_bytes
from vox_serve.voice_store import StoreFullError, UnknownVoiceError, VoiceExistsError, VoiceStore

SIZES = Sizes(num_codebooks=4, audio_vocab_size=67)


def make(name: str = "alice", sizes: Sizes = SIZES, seed: int = 0, speaker: int = 1) -> Voice:
    torch.manual_seed(seed)
    codes = [torch.randint(sizes.audio_vocab_size, (n, sizes.num_codebooks)) for n in (7, 1)]
    texts = "Hello, wörld.", "你好"
    return Voice(
        name=name,
        speaker=speaker,
        segments=tuple(Segment(speaker, t, c) for t, c in zip(texts, codes, strict=True)),
        sizes=sizes,
        created=1_700_000_000,
        frame_s=0.08,
        levels_dbfs=(-23.5, None),
        preview=np.arange(-50, 50, dtype=np.int16),
        sample_rate_hz=24_000,
    )


def assert_equal(a: Voice, b: Voice) -> None:
    plain = {"segments": (), "preview": None}
    assert replace(a, **plain) == replace(b, **plain)
    np.testing.assert_array_equal(a.preview, b.preview)
    for ours, theirs in zip(a.segments, b.segments, strict=True):
        assert (ours.speaker, ours.text) == (theirs.speaker, theirs.text)
        assert ours.codes.dtype == torch.int64
        assert torch.equal(ours.codes, theirs.codes)


@pytest.fixture(params=["folder", "memory"])
def folder(request, tmp_path):
    return tmp_path / "voices" if request.param == "folder" else None


@pytest.mark.parametrize("vocabulary", [67, 2**15, 2**15 + 1, 100_000])
def test_a_file_gives_the_voice_back(vocabulary):
    voice = make(sizes=Sizes(3, vocabulary))
    assert_equal(voice_from_bytes(voice_to_bytes(voice)), voice)


def test_voices_are_kept_listed_and_removed(folder):
    store = VoiceStore(folder, SIZES)
    assert store.voices() == []
    for name in ("bob", "alice"):
        store.add(make(name))
    assert store.names() == ["alice", "bob"]
    assert_equal(store.get("alice"), make("alice"))
    store.remove("alice")
    assert [voice.name for voice in store.voices()] == ["bob"]
    for call in (store.get, store.remove):
        with pytest.raises(UnknownVoiceError, match="no voice 'alice'"):
            call("alice")


def test_another_store_sees_what_a_folder_holds(tmp_path):
    first, second = (VoiceStore(tmp_path, SIZES) for _ in range(2))
    first.add(make())
    assert_equal(second.get("alice"), make())
    first.add(make(seed=1), replace=True)
    assert_equal(second.get("alice"), make(seed=1))
    second.remove("alice")
    assert first.names() == []
    with pytest.raises(UnknownVoiceError):
        first.get("alice")


def test_a_name_is_taken_until_replace_is_set(folder):
    store = VoiceStore(folder, SIZES)
    store.add(make("Alice"))
    for name in ("Alice", "alice", "ALICE"):
        with pytest.raises(VoiceExistsError, match=name):
            store.add(make(name, seed=1))
        assert_equal(store.get(name), make("Alice"))
    store.add(make("ALICE", seed=1), replace=True)
    assert_equal(store.get("alice"), make("ALICE", seed=1))
    assert len(store.voices()) == 1


@pytest.mark.parametrize("name", ["a", "A-1", "2b", "x_y", "0a", "z" * 64, "1-2", "nul"])
def test_names(name, folder):
    store = VoiceStore(folder, SIZES)
    store.add(make(name))
    assert store.get(name).name == name
    assert store.names() == [name.lower()]


@pytest.mark.parametrize(
    "name",
    ["", "0", "1", "12", ".", "..", "a/b", "../a", "/etc/passwd", "a.b", "-a", "_a", "a b", "a\n",
     "a\0", "ä", "\u017f", "\u0131", "a\u0301", "٣", "z" * 65, "a\\b", "\ud800", "a:b", "%2e%2e"],
    ids=ascii,
)  # fmt: skip
def test_other_names_are_refused_and_touch_no_file(name, folder, tmp_path):
    store = VoiceStore(folder, SIZES)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(VoiceError, match="a voice's name must be"):
        store.add(make(name))
    for call in (store.get, store.remove):
        with pytest.raises(UnknownVoiceError):
            call(name)
    assert [path for path in sorted(tmp_path.rglob("*")) if path.name != ".lock"] == before


def test_the_number_and_the_bytes_are_bounded(folder, monkeypatch):
    store = VoiceStore(folder, SIZES, max_voices=2)
    store.add(make("a"))
    store.add(make("b"))
    with pytest.raises(StoreFullError, match="2 voices"):
        store.add(make("c"))
    store.add(make("b", seed=1), replace=True)
    store.remove("a")
    monkeypatch.setattr(voice_store, "MAX_TOTAL_BYTES", len(voice_to_bytes(make("b"))) + 10)
    with pytest.raises(StoreFullError, match="bytes"):
        store.add(make("c"))
    store.add(make("b", seed=2), replace=True)


def test_of_many_threads_one_adds_a_name(folder):
    stores = [VoiceStore(folder, SIZES)] * 4 if folder is None else []
    stores = stores or [VoiceStore(folder, SIZES) for _ in range(4)]
    added, start = [], threading.Barrier(16)

    def add(i: int) -> None:
        start.wait()
        try:
            stores[i % 4].add(make(seed=i))
            added.append(i)
        except VoiceExistsError:
            pass

    threads = [threading.Thread(target=add, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(added) == 1
    assert_equal(stores[0].get("alice"), make(seed=added[0]))


def test_a_failed_write_leaves_the_old_voice(tmp_path, monkeypatch):
    store = VoiceStore(tmp_path, SIZES)
    store.add(make())

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="No space left"):
        store.add(make(seed=1), replace=True)
    monkeypatch.undo()
    assert_equal(VoiceStore(tmp_path, SIZES).get("alice"), make())
    assert {path.name for path in tmp_path.iterdir()} == {".lock", "alice.safetensors"}


def test_what_a_killed_process_left_is_removed(tmp_path):
    (tmp_path / ".alice.safetensors.0123.tmp").write_bytes(b"half")
    VoiceStore(tmp_path, SIZES)
    assert list(tmp_path.iterdir()) == []


def test_a_voice_of_another_model_is_refused_by_its_sizes(tmp_path):
    VoiceStore(tmp_path).add(make(sizes=Sizes(3, 50)))
    store = VoiceStore(tmp_path, SIZES)
    assert store.voices() == []
    with pytest.raises(VoiceError, match="3 codebooks of 50 codes, and this one has 4 of 67"):
        store.get("alice")
    with pytest.raises(VoiceError, match="3 codebooks"):
        store.add(make("b", sizes=Sizes(3, 50)))
    with pytest.raises(VoiceExistsError):
        store.add(make())
    store.add(make(), replace=True)
    assert_equal(store.get("alice"), make())


def test_a_renamed_file_is_a_voice_of_that_name(tmp_path):
    VoiceStore(tmp_path, SIZES).add(make())
    (tmp_path / "alice.safetensors").rename(tmp_path / "carol.safetensors")
    (tmp_path / "0.safetensors").write_bytes(voice_to_bytes(make()))
    (tmp_path / "notes.txt").write_text("not a voice")
    (tmp_path / "folder.safetensors").mkdir()
    (voice,) = VoiceStore(tmp_path, SIZES).voices()
    assert voice.name == "carol"


def changed(**fields) -> bytes:
    """A voice's file with other metadata; None removes a field."""
    info = {
        "format": 1,
        "name": "alice",
        "speaker": 0,
        "created": 1,
        "num_codebooks": 4,
        "audio_vocab_size": 67,
        "frame_s": 0.08,
        "sample_rate_hz": 24_000,
        "segments": [{"transcript": "Hello."}],
    } | fields
    info = {name: value for name, value in info.items() if value is not None}
    tensors = {"codes.0": np.zeros((2, 4), np.int16), "preview": np.zeros(3, np.int16)}
    return save(tensors, metadata={"voxkern_voice": json.dumps(info)})


def with_tensors(**tensors) -> bytes:
    text = json.dumps(json.loads(metadata(changed())["voxkern_voice"]))
    tensors = {"codes.0": np.zeros((2, 4), np.int16), "preview": np.zeros(3, np.int16)} | {
        name.replace("_", "."): value for name, value in tensors.items()
    }
    kept = {name: value for name, value in tensors.items() if value is not None}
    return save(kept, metadata={"voxkern_voice": text})


def metadata(data: bytes) -> dict:
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]


BROKEN = {
    "empty": (b"", "no safetensors file"),
    "garbage": (b"\xff" * 100, "no safetensors file"),
    "cut": (changed()[:-1], "no safetensors file"),
    "no metadata": (save({"preview": np.zeros(3, np.int16)}), "it is no voice"),
    "other metadata": (save({"preview": np.zeros(3, np.int16)}, {"a": "b"}), "it is no voice"),
    "not JSON": (save({"preview": np.zeros(3, np.int16)}, {"voxkern_voice": "{"}), "metadata"),
    "a list": (save({"preview": np.zeros(3, np.int16)}, {"voxkern_voice": "[]"}), "format None"),
    "later format": (changed(format=2), "format 2, this version reads 1"),
    "no segments": (changed(segments=[]), "segments"),
    "many segments": (changed(segments=[{"transcript": "x"}] * 17), "segments"),
    "a missing tensor": (changed(segments=[{"transcript": "x"}] * 2), "codes.1 is missing"),
    "a blank transcript": (changed(segments=[{"transcript": " \n"}]), "must not be blank"),
    "no transcript": (changed(segments=[{"level_dbfs": 1.0}]), "segments.0.transcript"),
    "a negative speaker": (changed(speaker=-1), "speaker"),
    "a speaker that is true": (changed(speaker=True), "speaker"),
    "no codebooks": (changed(num_codebooks=0), "num_codebooks"),
    "other codebooks": (changed(num_codebooks=5), r"\[N, 5\], but is \[2, 4\]"),
    "no name": (changed(name=None), "name"),
    "infinite frame": (changed(frame_s=1e400), "not finite"),
    "codes beyond": (with_tensors(codes_0=np.full((2, 4), 67, np.int16)), "0 to 66"),
    "negative codes": (with_tensors(codes_0=np.full((2, 4), -1, np.int32)), "0 to 66"),
    "no frames": (with_tensors(codes_0=np.zeros((0, 4), np.int16)), r"\[0, 4\]"),
    "huge and empty": (with_tensors(codes_0=np.zeros((2**40, 0), np.int16)), "codes.0"),
    "float codes": (with_tensors(codes_0=np.zeros((2, 4), np.float32)), "dtype F32"),
    "int64 codes": (with_tensors(codes_0=np.zeros((2, 4), np.int64)), "dtype I64"),
    "no preview": (with_tensors(preview=None), "preview"),
    "wide preview": (with_tensors(preview=np.zeros((3, 1), np.int16)), "preview"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_named_with_its_reason_and_hurts_no_other(name, tmp_path):
    data, says = BROKEN[name]
    (tmp_path / "bad.safetensors").write_bytes(data)
    (tmp_path / "good.safetensors").write_bytes(changed())
    store = VoiceStore(tmp_path, SIZES)
    assert [voice.name for voice in store.voices()] == ["good"]
    with pytest.raises(VoiceError, match=says) as error:
        store.get("bad")
    assert "voice 'bad' cannot be used" in str(error.value)
    assert str(tmp_path) not in str(error.value)
    assert "\n" not in str(error.value)
    store.remove("bad")
    assert store.names() == ["good"]


def test_a_long_file_and_a_pipe_are_not_read(tmp_path, monkeypatch):
    with open(tmp_path / "long.safetensors", "wb") as file:
        file.truncate(voice_store.MAX_FILE_BYTES + 1)
    os.mkfifo(tmp_path / "pipe.safetensors")
    store = VoiceStore(tmp_path, SIZES)
    with pytest.raises(VoiceError, match="longer than"):
        store.get("long")
    with pytest.raises(VoiceError, match="regular file"):
        store.get("pipe")


def test_a_folder_that_cannot_be_used_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(VoiceError, match=f"voices: folder {path} cannot be used: "):
            VoiceStore(path)
