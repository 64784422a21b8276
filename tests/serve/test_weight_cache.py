"""The cache of packed weights: used exactly when it fits the checkpoint."""

import json
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from adapters import write_adapter
from checkpoints import TinyShape, build_tiny
from forked_python import python
from vox_serve import say, weight_cache, weights
from vox_serve.atomic_file import replaced
from vox_serve.engine import Request
from vox_serve.loading import cache_folders, load_engine
from vox_serve.sampling import SamplingParams
from vox_serve.weight_cache import WeightCache
from vox_serve.weights import load_checkpoint

# Packed matrices need a multiple of 16 rows and of 32 columns.
PACKABLE = TinyShape(heads=4, depth_dim=64, depth_kv_heads=2, depth_ffn=96)
TIMEOUT_S = 120
ISA = torch.ops.voxkern.cpu_isa()
NAME = f"int4-bfloat16-{ISA}"


@pytest.fixture
def folder(tmp_path):
    return build_tiny(PACKABLE).write(tmp_path / "model")


@pytest.fixture
def no_packing(monkeypatch):
    """Once called, packing a matrix fails."""

    def fail(*_):
        raise AssertionError("packed a matrix, though there is a cache")

    return lambda: monkeypatch.setattr(weights, "pack", fail)


def load(folder, cache=None, quantize="int4", dtype=torch.bfloat16):
    caches = [folder / ".voxkern"] if cache is None else cache
    return load_checkpoint(folder, dtype, quantize=quantize, cache_folders=caches).weights


def assert_fresh(got, folder, quantize="int4", dtype=torch.bfloat16):
    """The weights equal those of a load without a cache."""
    expected = load(folder, [], quantize, dtype).named()
    assert_equal(got.named(), expected)


def assert_equal(got, expected):
    assert list(got) == list(expected)
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name], tensor), name


def files_in(cache):
    return sorted(path.name for path in cache.iterdir())


def is_mapped(tensor):
    """True if a tensor lies in a mapped file."""
    address = tensor.data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, _, end = line.split()[0].partition("-")
        if int(first, 16) <= address < int(end, 16):
            return line.endswith(".safetensors")
    return False


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_packed_once_then_mapped(folder, no_packing, quantize, dtype):
    expected = load(folder, [], quantize, dtype).named()
    first = load(folder, None, quantize, dtype)
    name = f"{quantize}-{str(dtype).removeprefix('torch.')}-{ISA}"
    assert files_in(folder / ".voxkern") == [f"{name}.json", f"{name}.safetensors"]
    no_packing()
    again = load(folder, None, quantize, dtype)
    for loaded in (first, again):  # the first start maps the file too
        assert_equal(loaded.named(), expected)
        for tensor in loaded.named().values():
            assert is_mapped(tensor)
            assert tensor.data_ptr() % 64 == 0 or tensor.nbytes % 64
    with safe_open(folder / ".voxkern" / f"{name}.safetensors", framework="pt") as file:
        assert_equal({key: file.get_tensor(key) for key in expected}, expected)


def test_plain_weights_are_not_cached(folder):
    load(folder, quantize="none")
    assert not (folder / ".voxkern").exists()


def test_speech_is_the_same_with_and_without_a_cache(folder, tmp_path, no_packing):
    cache = tmp_path / "elsewhere"
    request = Request("Hello.", sampling=SamplingParams(seed=3), max_frames=5)
    spoken = []
    for place in ("none", str(cache), str(cache)):
        engine = load_engine(str(folder), quantize="int4", weight_cache=place)
        spoken.append(say.speak(engine, request))
        if cache.exists():
            no_packing()
    for audio, codes, _ in spoken:
        assert len(codes) == 5
        np.testing.assert_array_equal(codes, spoken[0][1])
        np.testing.assert_array_equal(audio, spoken[0][0])
    assert not (folder / ".voxkern").exists()


def change_in_place(path):
    with open(path, "r+b") as file:
        file.seek(-64, os.SEEK_END)
        old = file.read(64)
        file.seek(-64, os.SEEK_END)
        file.write(bytes(byte ^ 1 for byte in old))


def replace_by_other(path):
    other = path.with_name("other")
    shutil.copyfile(path, other)
    change_in_place(other)
    os.replace(other, path)


@pytest.mark.parametrize("settled", [True, False])
@pytest.mark.parametrize("change", [change_in_place, replace_by_other])
def test_other_content_of_the_same_size_and_time(folder, monkeypatch, change, settled):
    if settled:  # otherwise stamps of files so young are not trusted
        monkeypatch.setattr(weight_cache, "_SETTLED_S", 0)
        monkeypatch.setattr(weight_cache, "_OUR_SETTLED_S", 0)
    # Without a codec inside, the last bytes belong to a weight.
    folder = build_tiny(PACKABLE).write(folder, codec="mimi")
    before = load(folder).named()
    path = folder / "model.safetensors"
    times = path.stat()
    change(path)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (times.st_size, times.st_mtime_ns)
    after = load(folder)
    assert_fresh(after, folder)
    assert any(not torch.equal(before[name], tensor) for name, tensor in after.named().items())


def test_an_untouched_file_is_not_read(folder, monkeypatch, no_packing):
    monkeypatch.setattr(weight_cache, "_SETTLED_S", 0)
    monkeypatch.setattr(weight_cache, "_OUR_SETTLED_S", 0)
    load(folder)
    no_packing()
    with monkeypatch.context() as patch:
        patch.setattr(weight_cache, "_digest", None)
        load(folder)
    # A touched or copied file is read once, and its content still fits.
    os.utime(folder / "model.safetensors")
    copy = shutil.copytree(folder, folder.with_name("copy"))
    for place in (folder, copy):
        load(place)
        with monkeypatch.context() as patch:
            patch.setattr(weight_cache, "_digest", None)
            assert load(place).depth.down.dtype == torch.uint8


def test_a_young_file_gets_no_stamp(folder, monkeypatch):
    monkeypatch.setattr(weight_cache, "_SETTLED_S", 3600)
    load(folder)
    record = json.loads((folder / ".voxkern" / f"{NAME}.json").read_text())
    assert all(stamp is None for _, _, stamp in record["sources"].values())


def test_other_settings_or_versions_are_packed_again(folder, monkeypatch):
    packed = []

    def count(weight, format, pack=weights.pack):
        packed.append(format)
        return pack(weight, format)

    monkeypatch.setattr(weights, "pack", count)

    def packs():
        packed.clear()
        load(folder)
        return bool(packed)

    assert packs()
    assert not packs()
    config = folder / "config.json"
    config.write_text(config.read_text() + " ")
    assert packs()
    for name in ("LAYOUT_VERSION", "STACKING_VERSION"):
        monkeypatch.setattr(weights, name, 99)
        assert packs()
        assert not packs()


def test_tensors_that_do_not_fit_are_packed_again(folder, monkeypatch):
    """As if a change of shapes had not increased the version."""
    load(folder)
    cut = {name: tensor[..., :-1].clone() for name, tensor in load(folder).named().items()}
    (folder / ".voxkern" / f"{NAME}.json").unlink()
    with monkeypatch.context() as patch:
        save = WeightCache.save
        patch.setattr(WeightCache, "save", lambda self, tensors: save(self, cut) and None)
        load(folder)
    for _ in range(2):
        assert_fresh(load(folder), folder)


def test_caches_of_other_contents_are_removed(folder):
    cache = folder / ".voxkern"
    for quantize in ("int8", "int4"):
        load(folder, None, quantize)
    both = [
        f"{name}-bfloat16-{ISA}.{end}"
        for name in ("int4", "int8")
        for end in ("json", "safetensors")
    ]
    assert files_in(cache) == both
    change_in_place(folder / "model.safetensors")
    load(folder)
    assert files_in(cache) == both[:2]


def cut(path):
    os.truncate(path, path.stat().st_size - 100)


def cut_to_nothing(path):
    os.truncate(path, 0)


def flip_unseen(path):
    times = path.stat()
    change_in_place(path)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def scribble(path):
    path.write_bytes(b"\xff" * path.stat().st_size)


@pytest.mark.slow
@pytest.mark.parametrize("damage", [cut, cut_to_nothing, flip_unseen, scribble, Path.unlink])
@pytest.mark.parametrize("ending", ["json", "safetensors"])
def test_a_damaged_cache_is_rebuilt(folder, no_packing, damage, ending):
    expected = load(folder, [])
    load(folder)
    damage(folder / ".voxkern" / f"{NAME}.{ending}")
    assert_equal(load(folder).named(), expected.named())
    no_packing()
    assert_equal(load(folder).named(), expected.named())


INVALID_RECORD = '{"version": [1], "sources": [], "tensors": [1, "x", null]}'


@pytest.mark.slow
@pytest.mark.parametrize(
    "text", ["[]", "{}", "null", '{"version": [1, 1]}', '"sources"', INVALID_RECORD]
)
def test_an_invalid_record_is_no_cache(folder, text):
    load(folder)
    (folder / ".voxkern" / f"{NAME}.json").write_text(text)
    assert_fresh(load(folder), folder)


def test_weights_in_use_outlive_their_file(folder):
    before = load(folder)
    expected = {name: tensor.clone() for name, tensor in before.named().items()}
    change_in_place(folder / "model.safetensors")
    load(folder)
    assert_equal(before.named(), expected)
    shutil.rmtree(folder)
    assert_equal(before.named(), expected)


def one_warning(caplog):
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert "\n" not in record.getMessage()
    return record.getMessage()


def test_a_full_disk_is_one_line(folder, caplog):
    load(folder)
    cache = folder / ".voxkern"
    size = (cache / f"{NAME}.safetensors").stat().st_size
    shutil.rmtree(cache)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1, hard))
    try:
        got = load(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "too large" in one_warning(caplog)
    assert files_in(cache) == []
    assert_fresh(got, folder)


def test_too_little_space_is_detected_before_writing(folder, monkeypatch, caplog):
    usage = shutil.disk_usage(folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    assert_fresh(load(folder), folder)
    assert "No space left" in one_warning(caplog)
    assert files_in(folder / ".voxkern") == []


def test_a_folder_that_cannot_be_written_to(folder, tmp_path, caplog, no_packing):
    # Nobody, not even root, can create a file there.
    forbidden = folder / ".voxkern"
    forbidden.symlink_to("/proc/self")
    assert_fresh(load(folder), folder)
    assert str(forbidden) in one_warning(caplog)
    caplog.clear()
    expected = load(folder, [])
    places = [forbidden, tmp_path / "user"]
    load(folder, places)
    assert files_in(tmp_path / "user") == [f"{NAME}.json", f"{NAME}.safetensors"]
    no_packing()
    assert_equal(load(folder, places).named(), expected.named())
    assert not caplog.records


def test_a_checkpoint_that_changes_while_it_is_read_is_not_cached(folder, monkeypatch, caplog):
    def read(*args, read=weights._read_weights):
        result = read(*args)
        change_in_place(folder / "model.safetensors")
        return result

    with monkeypatch.context() as patch:
        patch.setattr(weights, "_read_weights", read)
        load(folder)
    assert "was changed while it was read" in one_warning(caplog)
    assert files_in(folder / ".voxkern") == []
    assert_fresh(load(folder), folder)


@pytest.mark.parametrize("kept", [False, True], ids=["packed", "from a cache"])
@pytest.mark.parametrize("name", ["config.json", "adapter_config.json", "model.safetensors"])
def test_a_file_that_changes_after_the_settings_were_read(
    folder, tmp_path, monkeypatch, name, kept
):
    """The cache must not give or get weights of the file's earlier content for its new one."""
    adapter = write_adapter(build_tiny(PACKABLE), tmp_path / "adapter")
    path = (adapter if name.startswith("adapter") else folder) / name
    old = path.read_bytes()
    new = old[:-1] + bytes([old[-1] ^ 1]) if name.startswith("model") else old + b" "

    def load_once():
        caches = [tmp_path / "cache"]
        return load_checkpoint(
            folder, torch.bfloat16, quantize="int4", cache_folders=caches, adapter=adapter
        )

    if kept:
        load_once()
        path.write_bytes(new)
    records = files_in(tmp_path)

    def settings(*args, read=weights.model_settings):
        found = read(*args)
        path.write_bytes(old if kept else new)
        return found

    def mapped(*_):
        raise AssertionError("a cache was used or written")

    with monkeypatch.context() as patch:
        patch.setattr(weights, "model_settings", settings)
        patch.setattr(weight_cache, "_map", mapped)
        load_once()
    assert files_in(tmp_path) == ([*records] if kept else sorted([*records, "cache"]))


def test_settings_that_appear_after_they_were_looked_for(folder, tmp_path, monkeypatch, caplog):
    path = folder / "config.json"
    text = path.read_text()

    def settings(*args, read=weights.model_settings):
        found = read(*args)
        path.unlink()
        shutil.copy(tmp_path / "new", path)
        return found

    (tmp_path / "new").write_text(text)
    with monkeypatch.context() as patch:
        patch.setattr(weights, "model_settings", settings)
        load(folder)
    assert f"{path} was changed while it was read" in one_warning(caplog)
    assert files_in(folder / ".voxkern") == []


def run(script, *arguments):
    return subprocess.Popen(
        [*python(), "-c", script, *map(str, arguments)],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )


def test_files_of_killed_writers_are_removed_and_those_of_live_ones_stay(folder):
    cache = folder / ".voxkern"
    cache.mkdir()
    killed = run(
        "import os, signal, sys; from pathlib import Path\n"
        "from vox_serve.atomic_file import replaced\n"
        "with replaced(Path(sys.argv[1])) as file:\n"
        "    file.write(b'half')\n"
        "    file.flush()\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n",
        cache / f"{NAME}.safetensors",
    )
    killed.communicate(timeout=TIMEOUT_S)
    assert killed.returncode == -signal.SIGKILL
    (left,) = files_in(cache)
    with replaced(cache / "other.json") as file:
        load(folder)
        mine, there = os.path.basename(file.name), files_in(cache)
    file.close()
    assert mine != left
    assert there == sorted([mine, f"{NAME}.json", f"{NAME}.safetensors"])


AT_ONCE = """
import sys, torch
from pathlib import Path
from vox_serve import weight_cache
from vox_serve.weight_cache import WeightCache, folder_stamps

source, folder = Path(sys.argv[1]), Path(sys.argv[2])
weight_cache._OUR_SETTLED_S = 0
tensors = {"a": torch.arange(100_000), "b": torch.arange(33, dtype=torch.uint8)}
tensors = {name: tensor.to(torch.float32) for name, tensor in tensors.items()}
for i in range(100):
    cache = WeightCache([folder], "int4", [1], [source], folder_stamps(source.parent))
    got = cache.load() or cache.save(tensors)
    assert all(torch.equal(got[name], tensor) for name, tensor in tensors.items())
    if i % 3 == 0:
        (folder / "int4.json").unlink(missing_ok=True)
"""


@pytest.mark.slow
def test_concurrent_processes(tmp_path):
    """All get the weights, whichever writes them, and no temporary file remains."""
    source = tmp_path / "source"
    source.write_bytes(b"x" * 1000)
    os.utime(source)
    cache = tmp_path / "cache"
    processes = [run(AT_ONCE, source, cache) for _ in range(3)]
    for process in processes:
        _, errors = process.communicate(timeout=TIMEOUT_S)
        assert process.returncode == 0, errors
    assert set(files_in(cache)) <= {"int4.json", "int4.safetensors"}


def test_cache_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    folder = tmp_path / "model"
    beside, of_user = cache_folders(None, folder, small=False)
    assert beside == folder / ".voxkern"
    assert of_user.parent == tmp_path / "xdg" / "voxkern"
    assert cache_folders(None, folder, small=True) == []
    assert cache_folders("none", folder, small=False) == []
    (chosen,) = cache_folders(str(tmp_path / "mine"), folder, small=True)
    assert chosen.parent == tmp_path / "mine"
    (other,) = cache_folders(str(tmp_path / "mine"), tmp_path / "other" / "model", small=True)
    assert chosen != other
