"""`models inspect`: what a model is, found from headers alone, here and on the hub."""

import http.server
import json
import os
import shutil
import sys
import threading
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints import TinyShape, build_tiny
from gguf_files import write_crispasr, write_csm_rs
from vox_serve import hub, models
from vox_serve.frame_bytes import frame_bytes
from vox_serve.gguf_header import read_header
from vox_serve.loading import load_engine
from vox_serve.model_config import CsmConfig
from vox_serve.model_costs import Machine, costs
from vox_serve.weights import load_checkpoint

CSM_1B = {"text_vocab_size": 128256, "audio_vocab_size": 2051, "audio_num_codebooks": 32}


BLOCKS = TinyShape(dim=256, heads=8, head_dim=32, ffn=256, depth_dim=256, depth_ffn=256)
"""Rows of 256 values, which Q4_K needs."""


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch):
    monkeypatch.setattr("vox_serve.loading.choose_device", lambda: "cpu")


def inspected(capsys, *argv: str, code: int = 0) -> dict:
    capsys.readouterr()  # what making the model printed
    assert models.main(["inspect", *argv, "--json", "--bandwidth", "10"]) == code
    out = capsys.readouterr()
    assert not out.err
    found: dict = json.loads(out.out)
    return found


def test_a_folder_in_transformers_format(tmp_path, capsys):
    tiny = build_tiny()
    folder = tiny.write(tmp_path / "model", "sharded")
    found = inspected(capsys, str(folder))
    assert (found["kind"], found["what"]) == ("csm", "CSM in safetensors, transformers' names")
    assert len(found["files"]) == 2
    assert found["config"]["backbone"]["dim"] == tiny.shape.dim
    assert found["config"]["num_codebooks"] == tiny.shape.num_codebooks
    size = sum(4 * t.numel() for n, t in tiny.tensors.items() if not n.startswith("codec_model."))
    assert found["stored"] == {"F32": size}
    assert (found["tokenizer"], found["codec"]) == ("tokenizer.json", found["files"][0])
    assert [note.partition(":")[0] for note in found["notes"]] == [
        "no recordings of speakers 0 and 1"
    ]
    assert not found["problems"]
    assert found["machine"]["bytes_per_s"] == 1e10
    assert not found["machine"]["is_measured"]


def test_the_costs_are_those_of_the_loaded_model(tmp_path):
    tiny = build_tiny()
    folder = tiny.write(tmp_path)
    config = CsmConfig.from_json(tiny.config)
    table = costs(config, Machine("cpu", 1 << 30, 1e9, False))
    assert [cost.flags for cost in table] == ["--dtype float32", "--dtype bfloat16"]
    for cost, dtype in zip(table, (torch.float32, torch.bfloat16), strict=True):
        weights = load_checkpoint(folder, dtype).weights
        assert cost.frame_bytes == frame_bytes(weights).total
        assert cost.frames_per_s == 1e9 / cost.frame_bytes
        assert cost.fits
    assert not costs(config, Machine("cpu", 1000, 1e9, False))[0].fits


def test_csm_1b_in_every_precision():
    """As in docs/benchmarks.md, where a frame takes 284 ms in bfloat16 at 29 GB/s."""
    table = costs(CsmConfig.from_json(CSM_1B), Machine("cpu", 8 << 30, 40e9, False))
    assert [cost.flags for cost in table] == [
        "--dtype float32",
        "--dtype bfloat16",
        "--quantize int8",
        "--quantize int4",
    ]
    assert 0.284 * 0.9 < table[1].frame_bytes / 29e9 < 0.284 * 1.1
    assert [cost.is_real_time for cost in table] == [False, False, False, True]


def test_the_original_format_with_what_it_lacks(tmp_path, capsys):
    folder = build_tiny().write(tmp_path / "model", "original", codec=None)
    (folder / "tokenizer.json").unlink()
    found = inspected(capsys, str(folder), code=1)
    assert found["what"] == "CSM in safetensors, Sesame's original names"
    assert [problem.partition(":")[0] for problem in found["problems"]] == ["no tokenizer"]
    assert found["notes"][0].startswith("no Mimi codec: it comes from --codec")
    assert found["tokenizer"] is found["codec"] is None


def test_gguf_files(tmp_path, capsys):
    tiny = build_tiny(rope="csm")
    path = write_crispasr(tmp_path / "csm.gguf", tiny, "q8_0")
    for name in (str(path), str(tmp_path)):
        found = inspected(capsys, name)
        assert found["what"] == "CSM in GGUF, CrispASR's names"
        assert set(found["stored"]) == {"Q8_0", "F16", "F32"}
        assert found["tokenizer"] == found["codec"] == "csm.gguf"
        assert found["config"]["backbone"]["dim"] == tiny.shape.dim
    write_csm_rs(tmp_path / "q8.gguf", tiny)
    found = inspected(capsys, str(tmp_path), code=1)
    assert found["what"] == "GGUF files: give one of csm.gguf, q8.gguf"
    found = inspected(capsys, str(tmp_path / "q8.gguf"), code=1)
    assert found["what"] == "CSM in GGUF, transformers' names (csm.rs)"
    assert "hidden_size is 2048 (by default), but the tensors in q8.gguf" in found["problems"][0]
    assert found["precisions"] == []


def test_sizes_that_do_not_fit_are_a_problem(tmp_path, capsys):
    folder = build_tiny().write(tmp_path / "model")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"num_hidden_layers": 10**9}))
    found = inspected(capsys, str(folder), code=1)
    assert "num_hidden_layers is 1000000000" in found["problems"][0]
    assert found["config"] is None


def test_adapters(tmp_path, capsys):
    """The exit code tells whether --adapter takes it."""
    settings = {"peft_type": "LORA", "base_model_name_or_path": "sesame/csm-1b", "r": 8}
    config, tensors = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    config.write_text(json.dumps(settings))
    name = "base_model.model.backbone_model.layers.99.self_attn.q_proj.lora_A.weight"
    save_file({name: torch.zeros(4)}, tensors)
    found = inspected(capsys, str(tmp_path))
    assert (found["kind"], found["what"]) == ("adapter", "a LORA adapter of sesame/csm-1b")
    assert found["stored"] == {"F32": 16}
    assert found["adapter"]["r"] == 8
    assert found["machine"] is None
    for change, said in (
        ({"use_dora": True}, "use_dora = True is not supported"),
        ({"peft_type": "IA3"}, "peft_type must be 'LORA', got 'IA3'"),
        ({"r": 0}, "r must be a whole number"),
    ):
        config.write_text(json.dumps(settings | change))
        assert said in inspected(capsys, str(tmp_path), code=1)["problems"][0]
    config.write_text(json.dumps(settings))
    save_file({"model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(4)}, tensors)
    said = "belongs to no part of a CSM"
    assert said in inspected(capsys, str(tmp_path), code=1)["problems"][0]
    tensors.unlink()
    said = "adapter_model.safetensors is missing"
    assert inspected(capsys, str(tmp_path), code=1)["problems"] == [said]
    (tmp_path / "adapter_model.bin").write_bytes(b"never opened")
    said = "it has only adapter_model.bin, a pickle file"
    assert said in inspected(capsys, str(tmp_path), code=1)["problems"][0]


@pytest.mark.parametrize("name", ["mimi.safetensors", "tokenizer-e351c8d8.safetensors"])
def test_codecs(tmp_path, capsys, name):
    """The exit code tells whether --codec takes it."""
    file = build_tiny().write(tmp_path / "model", codec="mimi") / "mimi.safetensors"
    file = file.rename(tmp_path / name)
    shutil.rmtree(tmp_path / "model")
    for name in (tmp_path, file):
        found = inspected(capsys, str(name))
        assert (found["kind"], found["codec"]) == ("codec", file.name)
    without(file, "fc1.weight")
    assert "Mimi checkpoint: " in inspected(capsys, str(tmp_path), code=1)["problems"][0]
    file.write_bytes(b"")
    said = f"{file.name} cannot be read as safetensors"
    assert said in inspected(capsys, str(tmp_path), code=1)["problems"][0]


@pytest.mark.parametrize("prefix", ["", "language_model."])
@pytest.mark.parametrize("settings", [None, {"model_type": "llama", "hidden_size": 64}])
def test_a_llama_with_a_head_of_its_own(tmp_path, capsys, settings, prefix):
    names = ["lm_head", "model.embed_tokens", "model.norm", "model.layers.0.self_attn.q_proj"]
    tensors = {f"{prefix}{name}.weight": torch.zeros(64, 64) for name in names}
    save_file(tensors, tmp_path / "model.safetensors")
    if settings:
        (tmp_path / "config.json").write_text(json.dumps(settings))
    found = inspected(capsys, str(tmp_path), code=1)
    model = "model_type 'llama' in config.json" if settings else "another model"
    assert (found["kind"], found["what"]) == ("other", f"no CSM: {model}, 4 tensors")
    assert found["problems"] == ["it is no CSM"]
    with pytest.raises(ValueError, match=r"model.safetensors holds no CSM: it has no tensors such"):
        load_engine(str(tmp_path), context="none")


def special(path: Path, kind: str) -> None:
    """Put something else in the place of a file."""
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/gone" if kind == "broken link" else "/dev/zero")


def edit(path: Path, change) -> None:
    """Replace the tensors of a file."""
    save_file({n: t.contiguous() for n, t in change(load_file(path)).items()}, path)


def without(path: Path, *ends: str) -> None:
    edit(path, lambda tensors: {n: t for n, t in tensors.items() if not n.endswith(ends)})


def pickled(*names: str):
    def change(folder: Path) -> None:
        for name in names:
            (folder / name).write_bytes(b"never opened")
        (folder / "model.safetensors").unlink()

    return change


def configured(text: str):
    return lambda folder: (folder / "config.json").write_text(text)


def cut(name: str):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-9])


def appended(folder: Path) -> None:
    with open(folder / "model.safetensors", "ab") as file:
        file.write(bytes(64))


def below(folder: Path) -> None:
    """Shards in a folder of their own."""
    (folder / "shards").mkdir()
    (folder / "model.safetensors").rename(folder / "shards" / "a.safetensors")
    index = {"weight_map": {"x": "shards/a.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def lost(folder: Path) -> None:
    below(folder)
    (folder / "shards" / "a.safetensors").unlink()


def recorded(folder: Path) -> None:
    (folder / "prompts").mkdir()
    for name in "ab":
        (folder / "prompts" / f"conversational_{name}.wav").write_bytes(b"RIFF")


def few_codebooks(folder: Path) -> None:
    build_tiny(TinyShape(num_codebooks=8)).write(folder, codec=None)
    build_tiny().write(folder / "other", codec="mimi")
    (folder / "other" / "mimi.safetensors").rename(folder / "mimi.safetensors")


TABLES = ("embed_audio_tokens.weight", "depth_decoder.model.embed_tokens.weight")
FOLDERS = {
    "whole": lambda folder: None,
    "shards below": below,
    "lost shard": lost,
    "bin": pickled("pytorch_model.bin"),
    "pth": pickled("csm.pth"),
    "pt": pickled("ckpt.pt"),
    "several pickles": pickled("a.bin", "b.bin"),
    "pickles of a trainer": pickled("training_args.bin", "optimizer.pt"),
    "empty settings": configured("{}"),
    "no settings": lambda folder: (folder / "config.json").unlink(),
    "other settings": configured('{"backbone_config": {}}'),
    "no audio table": lambda folder: without(folder / "model.safetensors", *TABLES),
    "no head": lambda folder: without(folder / "model.safetensors", "lm_head.weight"),
    "no norm": lambda folder: without(folder / "model.safetensors", "backbone_model.norm.weight"),
    "part of a codec": lambda folder: without(folder / "model.safetensors", "fc1.weight"),
    "few codebooks": few_codebooks,
    "cut": cut("model.safetensors"),
    "longer": appended,
    "cut tokenizer": cut("tokenizer.json"),
    "other tokenizer": lambda folder: (folder / "tokenizer.json").write_text("{}"),
    "recordings": recorded,
}
FOLDERS |= {
    f"{name} is a {kind}": lambda folder, name=name, kind=kind: special(folder / name, kind)
    for name in ("config.json", "model.safetensors", "tokenizer.json", "mimi.safetensors")
    for kind in ("pipe", "device", "folder", "broken link")
}


@pytest.mark.parametrize("change", FOLDERS.values(), ids=FOLDERS)
def test_the_exit_code_is_launchs(tmp_path, capsys, change):
    folder = build_tiny().write(tmp_path / "model")
    change(folder)
    try:
        load_engine(str(folder), weight_cache="none")
        said = None
    except (OSError, ValueError) as error:
        said = str(error)
    capsys.readouterr()
    code = models.main(["inspect", str(folder), "--bandwidth", "10"])
    out = capsys.readouterr()
    assert code == (said is not None), (said, out)
    assert ("problem: " in out.out or out.err.count("\n") == 1) == bool(code)


def test_a_file_of_a_folder(tmp_path, capsys):
    """launch takes folders, and GGUF files."""
    folder = build_tiny().write(tmp_path / "model")
    found = inspected(capsys, str(folder / "model.safetensors"), code=1)
    assert found["problems"][0].endswith("is a file: give the folder that contains it")


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "broken link"])
@pytest.mark.parametrize("name", ["a.gguf", "a.safetensors", "a.bin"])
def test_a_special_file_by_its_name(tmp_path, capsys, name, kind):
    special(tmp_path / name, kind)
    for path in (tmp_path, tmp_path / name):
        assert models.main(["inspect", str(path)]) == 1
        assert capsys.readouterr().err.count("\n") < 2


def test_gguf_files_that_launch_refuses(tmp_path, capsys, monkeypatch):
    tiny = build_tiny(BLOCKS, rope="csm")
    path = write_crispasr(tmp_path / "csm.gguf", tiny, "q4_k")
    assert not inspected(capsys, str(path))["problems"]
    data = path.read_bytes()
    place = read_header(path).tensors["backbone.blk.0.ffn_up.weight"]
    blocks = np.frombuffer(data[place.start : place.start + place.num_bytes], np.uint8)
    blocks = blocks.reshape(-1, 144).copy()
    blocks[:, 2:4].view(np.float16)[:] = -0.5
    path.write_bytes(data[: place.start] + blocks.tobytes() + data[place.start + place.num_bytes :])
    said = inspected(capsys, str(path), code=1)["problems"][0]
    assert "its Q4_K blocks are not ggml's" in said
    path.write_bytes(data)
    (tmp_path / "ckpt.pt").write_bytes(b"never opened")
    assert inspected(capsys, str(tmp_path), code=1)["kind"] == "pickle"
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.setattr("vox_serve.inspection_checks.find_spec", lambda name: None)
    assert "need the package gguf" in inspected(capsys, str(path), code=1)["problems"][0]


def test_too_little_memory_is_a_problem(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("vox_serve.model_costs.device_memory_bytes", lambda device: 1000)
    found = inspected(capsys, str(build_tiny().write(tmp_path)), code=1)
    assert found["problems"] == ["this machine has too little memory for any precision"]


def test_nothing(tmp_path, capsys):
    found = inspected(capsys, str(tmp_path), code=1)
    assert found["what"].startswith("nothing that is known")
    assert found["problems"] == ["it has no weights"]


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("a.gguf", b"GGML", "a.gguf cannot be read as GGUF: it starts with b'GGML'"),
        ("model.safetensors", b"\xff" * 16, "it has no header of safetensors"),
        ("model.safetensors", b"\x02" + bytes(7) + b"[]", "its header is no JSON object"),
        ("model.safetensors", b"\x07" + bytes(7) + b'{"a":1}', "its header has no tensor in 'a'"),
        ("config.json", b"[", "config.json cannot be read as JSON"),
        ("adapter_config.json", b"{" * 10**5, "adapter_config.json cannot be read as JSON"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_line(tmp_path, capsys, name, data, said):
    (tmp_path / name).write_bytes(data)
    assert models.main(["inspect", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("models: error: ")
    assert said in error
    assert error.count("\n") == 1


def test_a_header_with_other_sizes_than_its_values(tmp_path, capsys):
    entry = {"a": {"dtype": "F32", "shape": [2**40, 2**20], "data_offsets": [0, 8]}}
    text = json.dumps(entry).encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    assert models.main(["inspect", str(tmp_path)]) == 1
    assert "tensor 'a' has no F32 values of [1099511627776, 1048576]" in capsys.readouterr().err


def test_the_report_for_people(capsys):
    """The built-in voice, with the bandwidth measured."""
    assert models.main(["inspect", "demo"]) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert lines[0] == "demo: CSM in safetensors, transformers' names"
    assert "  backbone: " in out
    assert "  tokenizer: tokenizer.json" in lines
    assert "--quantize int4" in out
    assert "GB/s (measured); 12.5 are real time" in lines[-1]
    assert max(map(len, lines)) <= 160


class Ranges(http.server.BaseHTTPRequestHandler):
    """Serves files in parts, and counts the bytes."""

    root: Path
    served = 0
    whole = False

    def do_GET(self):
        data = (self.root / self.path.lstrip("/")).read_bytes()
        start, end = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
        part = data if self.whole else data[start : end + 1]
        self.send_response(200 if self.whole else 206 if part else 416)
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        try:
            self.wfile.write(part)
        except ConnectionError:
            return
        Ranges.served += len(part)

    def log_message(self, *args):
        pass


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A folder for the files of a repository some/model on a hub that sends parts of files."""
    root = tmp_path / "hub" / "some" / "model"

    def snapshot(repo, allow_patterns, dry_run):
        assert repo == "some/model"
        assert dry_run
        files = [path for path in root.rglob("*") if path.is_file()]
        names = {str(path.relative_to(root)): path.stat().st_size for path in files}
        wanted = huggingface_hub.utils.filter_repo_objects(names, allow_patterns=allow_patterns)
        return [
            huggingface_hub.DryRunFileInfo("", names[name], name, "", False, True)
            for name in wanted
        ]

    def file(repo, name, local_files_only=False, dry_run=False):
        if not (root / name).is_file():
            raise huggingface_hub.errors.EntryNotFoundError(f"404: {name}")
        size = (root / name).stat().st_size
        info = huggingface_hub.DryRunFileInfo("", size, name, "", False, True)
        return info if dry_run else str(root / name)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", file)
    monkeypatch.setattr(hub, "_is_reachable", lambda endpoint: True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("vox_serve.remote_file.CHUNK_BYTES", 1 << 14)
    Ranges.root, Ranges.served, Ranges.whole = root, 0, False
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Ranges) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(huggingface_hub, "hf_hub_url", lambda repo, name: f"{url}/{name}")
        yield root
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("whole", [False, True], ids=["ranges", "no ranges"])
def test_a_repository_is_read_in_parts(repository, capsys, whole):
    build_tiny().write(repository)
    Ranges.whole = whole
    found = inspected(capsys, "some/model")
    assert found["what"] == "CSM in safetensors, transformers' names"
    assert found["tokenizer"] == "tokenizer.json"
    if not whole:
        assert Ranges.served < (repository / "model.safetensors").stat().st_size / 4


def test_gguf_files_of_a_repository(repository, capsys):
    repository.mkdir(parents=True)
    tiny = build_tiny(rope="csm")
    write_crispasr(repository / "csm-1b-q8_0.gguf", tiny, "q8_0")
    write_crispasr(repository / "csm-1b-f16.gguf", tiny, "f16")
    found = inspected(capsys, "some/model:f16")
    assert found["files"] == ["csm-1b-f16.gguf"]
    assert found["codec"] == found["tokenizer"] == "csm-1b-f16.gguf"
    assert Ranges.served < (repository / "csm-1b-f16.gguf").stat().st_size / 2
    found = inspected(capsys, "some/model", code=1)
    assert found["what"].startswith("GGUF files: give one of ")
    assert models.main(["inspect", "some/model:q4_k"]) == 1
    assert "has no GGUF file q4_k" in capsys.readouterr().err


def test_a_hub_that_fails_is_one_line(repository, capsys, monkeypatch):
    build_tiny().write(repository)
    monkeypatch.setattr(huggingface_hub, "hf_hub_url", lambda repo, name: "http://127.0.0.1:9/x")
    assert models.main(["inspect", "some/model"]) == 1
    error = capsys.readouterr().err
    assert "http://127.0.0.1:9/x cannot be read: " in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "said"), [("a/b/c", "no model 'a/b/c'"), ("./gone", "no model './gone'")]
)
def test_a_wrong_name_is_one_line(tmp_path, monkeypatch, capsys, name, said):
    monkeypatch.chdir(tmp_path)
    assert models.main(["inspect", name]) == 1
    assert said in capsys.readouterr().err
