"""`models inspect`: what a model is, found from headers alone, here and on the hub."""

import http.server
import json
import threading
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file

from checkpoints import build_tiny
from gguf_files import write_crispasr, write_csm_rs
from vox_serve import hub, models
from vox_serve.frame_bytes import frame_bytes
from vox_serve.model_config import CsmConfig
from vox_serve.model_costs import Machine, costs
from vox_serve.weights import load_checkpoint

CSM_1B = {"text_vocab_size": 128256, "audio_vocab_size": 2051, "audio_num_codebooks": 32}


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
    found = inspected(capsys, str(tmp_path), code=0)
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


def test_adapters_codecs_and_others(tmp_path, capsys):
    settings = {"peft_type": "LORA", "base_model_name_or_path": "sesame/csm-1b", "r": 8}
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(settings))
    save_file({"x": torch.zeros(4)}, tmp_path / "a" / "adapter_model.safetensors")
    found = inspected(capsys, str(tmp_path / "a"))
    assert (found["kind"], found["what"]) == ("adapter", "a LORA adapter of sesame/csm-1b")
    assert found["stored"] == {"F32": 16}
    assert found["adapter"]["r"] == 8
    assert found["machine"] is None
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "config.json").write_text('{"model_type": "llama"}')
    save_file({"x": torch.zeros(4)}, tmp_path / "b" / "model.safetensors")
    found = inspected(capsys, str(tmp_path / "b"))
    assert found["what"] == "no CSM: model_type 'llama' in config.json, 1 tensors"
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "ckpt.pt").write_bytes(b"never opened")
    assert inspected(capsys, str(tmp_path / "c"), code=1)["kind"] == "pickle"
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "mimi.safetensors").write_bytes(b"")
    assert inspected(capsys, str(tmp_path / "d"))["kind"] == "codec"
    (tmp_path / "e").mkdir()
    assert inspected(capsys, str(tmp_path / "e"))["what"].startswith("nothing that is known")


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
    assert inspected(capsys, "some/model")["what"].startswith("GGUF files: give one of ")
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
