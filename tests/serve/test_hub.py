"""Resolving model names: local folders, the hub (a stand-in), the hub's cache, and each failure.

No test needs a network. The failures run the real huggingface_hub client in a subprocess because it
reads its environment only once.
"""

import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects

from checkpoints import build_tiny
from vox_serve import hub
from vox_serve.hub import (
    ModelNotFoundError,
    resolve_adapter,
    resolve_codec,
    resolve_model,
    resolve_tokenizer,
)
from vox_serve.weights import load_checkpoint


def test_local_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "model").mkdir(parents=True)
    assert resolve_model("org/model") == Path("org/model")
    assert resolve_model(str(tmp_path)) == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_model("~/org") == tmp_path / "org"
    (tmp_path / "file.safetensors").touch()
    assert resolve_codec("file.safetensors") == Path("file.safetensors")
    assert resolve_codec("org") == Path("org")
    with pytest.raises(ModelNotFoundError, match="is a file: give the folder"):
        resolve_model("file.safetensors")


def test_built_in_voice(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "BUILT_IN_VOICES", tmp_path / "builtin")
    with pytest.raises(ModelNotFoundError, match="this installation has none"):
        resolve_model("demo")
    (tmp_path / "builtin" / "demo").mkdir(parents=True)
    assert resolve_model("demo") == tmp_path / "builtin" / "demo"
    with pytest.raises(ModelNotFoundError, match=r"no built-in voice \(demo\)"):
        resolve_model("other")


@pytest.mark.parametrize(
    "name",
    [
        "",
        " ",
        "./gone",
        "/gone/model",
        "a/b/c",
        "a\\b",
        "a b/c",
        "gone",
        "~/gone",
        "~nobody/x",
        "a\x00b",
        "x" * 5000,
    ],
)
def test_a_wrong_path_is_refused_without_the_hub(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "_Hub", None)
    for resolve in (resolve_model, resolve_codec):
        with pytest.raises(ModelNotFoundError, match=r"no (model|codec) .* no hub id") as error:
            resolve(name)
        assert "\n" not in str(error.value)


class StandIn:
    """huggingface_hub's two download functions, served from one local folder per repository."""

    def __init__(self, root: Path, cache: Path):
        self.root, self.cache = root, cache

    def file(self, repo: str, name: str, local_files_only=False, dry_run=False):
        assert not local_files_only
        source = self.root / repo / name
        if not source.is_file():
            raise huggingface_hub.errors.EntryNotFoundError(f"404: {name}")
        if dry_run:
            return self._size(repo, name)
        return str(self._store(repo, name))

    def snapshot(self, repo: str, allow_patterns: list[str], local_files_only=False, dry_run=False):
        assert not local_files_only
        files = (p for p in (self.root / repo).rglob("*") if p.is_file())
        names = [str(p.relative_to(self.root / repo)) for p in files]
        wanted = list(filter_repo_objects(names, allow_patterns=allow_patterns))
        if dry_run:
            return [self._size(repo, name) for name in wanted]
        for name in wanted:
            self._store(repo, name)
        return str(self.cache / repo)

    def _size(self, repo: str, name: str) -> SimpleNamespace:
        size = (self.root / repo / name).stat().st_size
        return SimpleNamespace(filename=name, file_size=size, will_download=True)

    def _store(self, repo: str, name: str) -> Path:
        target = self.cache / repo / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((self.root / repo / name).read_bytes())
        return target

    def stored(self, repo: str) -> set[str]:
        folder = self.cache / repo
        return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def stand_in(tmp_path, monkeypatch) -> StandIn:
    stand_in = StandIn(tmp_path / "hub", tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", stand_in.file)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", stand_in.snapshot)
    monkeypatch.setattr(hub, "_is_reachable", lambda endpoint: True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.chdir(tmp_path)
    return stand_in


def test_only_one_format_is_downloaded(stand_in):
    repo = stand_in.root / "sesame" / "csm-1b"
    tiny = build_tiny()
    tiny.write(repo, "sharded")
    (repo / "ckpt.pt").write_bytes(b"never")
    (repo / "README.md").write_text("words")
    (repo / "prompts").mkdir()
    for name in ("conversational_a.wav", "conversational_b.wav", "read_speech_a.wav"):
        (repo / "prompts" / name).touch()
    folder = resolve_model("sesame/csm-1b")
    assert stand_in.stored("sesame/csm-1b") == {
        "config.json",
        "tokenizer.json",
        "transformers.safetensors.index.json",
        "transformers-00001-of-00002.safetensors",
        "transformers-00002-of-00002.safetensors",
        "prompts/conversational_a.wav",
        "prompts/conversational_b.wav",
    }
    weights = load_checkpoint(folder, torch.float32).weights
    assert torch.equal(weights.code0_head, tiny.model.lm_head.weight)


def test_a_file_that_would_not_be_read_is_not_downloaded(stand_in, monkeypatch):
    repo = stand_in.root / "some" / "copy"
    build_tiny().write(repo)
    os.truncate(repo / "config.json", 1 << 30)
    with pytest.raises(ModelNotFoundError, match=r"some/copy: config.json has 1073741824 bytes"):
        resolve_model("some/copy")
    assert stand_in.stored("some/copy") == set()
    build_tiny().write(repo)
    os.truncate(repo / "tokenizer.json", 1 << 30)
    with pytest.raises(ModelNotFoundError, match=r"some/copy: tokenizer.json has 1073741824"):
        resolve_model("some/copy")
    assert stand_in.stored("some/copy") == {"config.json"}
    build_tiny().write(repo)
    monkeypatch.setattr(hub, "_free_bytes", lambda: 100_000)
    with pytest.raises(ModelNotFoundError, match=r"some/copy needs 0.\d GB, but .* 0.0 GB free"):
        resolve_model("some/copy")


@pytest.mark.parametrize("layout", ["hf", "original"])
def test_a_repository_whose_config_names_no_weights(stand_in, layout):
    tiny = build_tiny()
    tiny.write(stand_in.root / "some" / "copy", layout, codec="mimi")
    folder = resolve_model("some/copy")
    assert {"model.safetensors", "mimi.safetensors"} < stand_in.stored("some/copy")
    weights = load_checkpoint(folder, torch.float32).weights
    assert torch.equal(weights.code0_head, tiny.model.lm_head.weight)


def test_codec_repositories(stand_in):
    """kyutai/mimi has its codec under the file name that kyutai/moshi uses for a language model."""
    moshi_file = "tokenizer-e351c8d8-checkpoint125.safetensors"
    for repo, settings, files in (
        ("kyutai/mimi", {"model_type": "mimi"}, ["model.safetensors"]),
        ("kyutai/moshi", {"model_type": "moshi"}, ["model.safetensors", moshi_file]),
        ("kyutai/bare", None, ["model.safetensors", moshi_file]),
    ):
        folder = stand_in.root / repo
        folder.mkdir(parents=True)
        if settings:
            (folder / "config.json").write_text(json.dumps(settings))
        for name in files:
            (folder / name).touch()
    resolve_codec()
    assert stand_in.stored("kyutai/mimi") == {"config.json", "model.safetensors"}
    resolve_codec("kyutai/moshi")
    assert stand_in.stored("kyutai/moshi") == {"config.json", moshi_file}
    resolve_codec("kyutai/bare")
    assert stand_in.stored("kyutai/bare") == {moshi_file}


def write_adapter(folder: Path) -> None:
    folder.mkdir(parents=True)
    settings = {"peft_type": "LORA", "base_model_name_or_path": "unsloth/csm-1b"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    for name in ("adapter_model.safetensors", "optimizer.pt", "tokenizer.json", "README.md"):
        (folder / name).touch()


def test_adapters(stand_in):
    write_adapter(stand_in.root / "some" / "adapter")
    assert resolve_adapter("some/adapter") == stand_in.cache / "some" / "adapter"
    files = {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"}
    assert stand_in.stored("some/adapter") == files
    write_adapter(stand_in.root / "local")
    assert resolve_adapter(str(stand_in.root / "local")) == stand_in.root / "local"
    with pytest.raises(ModelNotFoundError, match="is a file: give the adapter's folder"):
        resolve_adapter(str(stand_in.root / "local" / "README.md"))
    with pytest.raises(ModelNotFoundError, match=r"no adapter '\./gone': it is no folder"):
        resolve_adapter("./gone")


def test_a_pickled_adapter(stand_in):
    folder = stand_in.root / "some" / "adapter"
    write_adapter(folder)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(ModelNotFoundError, match=r"some/adapter has only adapter_model.bin, a pic"):
        resolve_adapter("some/adapter")
    assert not stand_in.cache.exists()
    resolve_adapter("some/adapter", allow_pickle=True)
    files = {"adapter_config.json", "adapter_model.bin", "tokenizer.json"}
    assert stand_in.stored("some/adapter") == files
    (folder / "adapter_model.safetensors").touch()
    resolve_adapter("some/adapter", allow_pickle=True)
    assert stand_in.stored("some/adapter") == files | {"adapter_model.safetensors"}


@pytest.mark.parametrize("settings", [None, {"model_type": "csm"}])
@pytest.mark.parametrize("name", ["ckpt.pt", "pytorch_model.bin", "csm.pth"])
def test_a_pickled_model_is_not_downloaded(stand_in, settings, name):
    folder = stand_in.root / "some" / "pickle"
    folder.mkdir(parents=True)
    for file in (name, "optimizer.pt", "training_args.bin"):
        (folder / file).touch()
    if settings is not None:
        (folder / "config.json").write_text(json.dumps(settings))
    said = rf"some/pickle has only {name}, a pickle file, which is not downloaded: download it, and"
    with pytest.raises(ModelNotFoundError, match=said):
        resolve_model("some/pickle")
    assert not stand_in.stored("some/pickle") & {name, "optimizer.pt"}


def test_an_adapter_as_the_model(stand_in):
    write_adapter(stand_in.root / "some" / "adapter")
    folder = resolve_model("some/adapter")
    with pytest.raises(ValueError, match="no model: give --model unsloth/csm-1b --adapter"):
        load_checkpoint(folder, torch.float32)


def test_a_model_without_settings(stand_in):
    """As MisoTTS is published: weights alone."""
    folder = stand_in.root / "some" / "weights"
    folder.mkdir(parents=True)
    for name in ("model.safetensors", "README.md"):
        (folder / name).touch()
    assert resolve_model("some/weights") == stand_in.cache / "some" / "weights"
    assert stand_in.stored("some/weights") == {"model.safetensors"}


def test_tokenizers(stand_in):
    folder = stand_in.root / "some" / "llama"
    folder.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "model.safetensors"):
        (folder / name).touch()
    assert resolve_tokenizer("some/llama") == stand_in.cache / "some" / "llama"
    assert stand_in.stored("some/llama") == {"tokenizer.json", "tokenizer_config.json"}


def test_a_repository_without_a_model(stand_in):
    (stand_in.root / "some" / "words").mkdir(parents=True)
    with pytest.raises(ModelNotFoundError, match=r"some/words lacks a file .*config.json"):
        resolve_model("some/words")
    settings = {"transformers_weights": "w.safetensors.index.json"}
    (stand_in.root / "some" / "words" / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelNotFoundError, match=r"lacks a file .*w.safetensors.index.json"):
        resolve_model("some/words")
    (stand_in.root / "some" / "words" / "w.safetensors.index.json").write_text("{}")
    with pytest.raises(ModelNotFoundError, match="has no weight_map"):
        resolve_model("some/words")


def test_gguf_files_of_a_repository(stand_in):
    """As with llama.cpp, a colon and a file's name, or the end of it, choose one of several."""
    repo = stand_in.root / "some" / "quants"
    repo.mkdir(parents=True)
    for name in ("csm-1b-q8_0.gguf", "csm-1b-q4_k.gguf", "README.md", "tokenizer.json"):
        (repo / name).write_text("{}")
    for wanted in ("q8_0", "Q8_0", "csm-1b-q8_0.gguf", "csm-1b-q8_0", "1b-q8_0"):
        path = resolve_model(f"some/quants:{wanted}")
        assert path.name == "csm-1b-q8_0.gguf"
    assert stand_in.stored("some/quants") == {"csm-1b-q8_0.gguf", "tokenizer.json"}
    for name, said in (
        ("some/quants", "has several GGUF files: give one as some/quants:FILE; it has csm-1b-q4_k"),
        ("some/quants:8_0", "has no GGUF file 8_0: give one as some/quants:FILE; it has csm-1b-q4"),
        ("some/quants:f16", "has no GGUF file f16"),
    ):
        with pytest.raises(ModelNotFoundError, match=f"some/quants {said}"):
            resolve_model(name)
    (repo / "csm-1b-q4_k.gguf").unlink()
    assert resolve_model("some/quants").name == "csm-1b-q8_0.gguf"
    build_tiny().write(repo)
    folder = resolve_model("some/quants")
    assert (folder / "model.safetensors").is_file()
    assert resolve_model("some/quants:q8_0").name == "csm-1b-q8_0.gguf"


def test_a_repository_with_a_config_and_gguf_alone(stand_in):
    repo = stand_in.root / "some" / "quants"
    build_tiny().write(repo, codec="mimi")
    (repo / "model.safetensors").unlink()
    (repo / "q8.gguf").touch()
    assert resolve_model("some/quants").name == "q8.gguf"
    assert stand_in.stored("some/quants") == {
        "config.json",
        "mimi.safetensors",
        "q8.gguf",
        "tokenizer.json",
    }


def test_a_local_gguf_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.gguf").touch()
    assert resolve_model("a.gguf") == Path("a.gguf")


CLIENT = """
import sys, time
from vox_serve.hub import ModelNotFoundError, resolve_codec, resolve_model

for name in sys.argv[1:]:
    start = time.monotonic()
    try:
        text = str(resolve_codec() if name == "codec" else resolve_model(name))
    except ModelNotFoundError as error:
        text = str(error)
    print(repr(text), time.monotonic() - start, sep="\t")
"""


def run_client(tmp_path, *names: str, **environ: str) -> list[str]:
    """The real client's folder or error for each name ("codec" is the default codec).

    Each must take less than ten seconds and be one line.
    """
    inherited = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
    inherited.pop("HF_HUB_CACHE", None)
    environ = inherited | {
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_OFFLINE": "0",
        "PYTHONPATH": os.pathsep.join(sys.path),
        **environ,
    }
    done = subprocess.run(
        [sys.executable, "-c", CLIENT, *names],
        env=environ,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    texts = []
    for line in done.stdout.splitlines():
        text, seconds = line.split("\t")
        assert float(seconds) < 10
        assert "\\n" not in text
        texts.append(text[1:-1])
    assert len(texts) == len(names)
    return texts


def fill_cache(tmp_path) -> Path:
    """Put a repository some/model into the hub's cache in the client's own layout."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = tmp_path / "hf" / "hub" / "models--some--model"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    return build_tiny().write(repo / "snapshots" / commit, "sharded")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("environ", "why"),
    [
        ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"),
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "http://127.0.0.1:9 cannot be reached"),
    ],
    ids=["forbidden", "unreachable"],
)
def test_offline(tmp_path, environ, why):
    cached = fill_cache(tmp_path)
    repo = tmp_path / "hf" / "hub" / "models--some--quants"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("1" * 40)
    (repo / "snapshots" / ("1" * 40)).mkdir(parents=True)
    quants = repo / "snapshots" / ("1" * 40) / "csm-q8_0.gguf"
    quants.touch()
    names = ("sesame/csm-1b", "codec", "some/model", "some/quants:q8_0", "some/quants:f16")
    model, codec, found, quant, none = run_client(tmp_path, *names, **environ)
    assert quant == str(quants)
    assert none.startswith("some/quants has no GGUF file f16")
    assert (
        f"sesame/csm-1b is no folder here, is not (wholly) in the local cache, and {why}" in model
    )
    assert model.endswith("connect once to download it, or give a local folder")
    assert codec.startswith("kyutai/mimi is no folder here")
    assert codec.endswith("or give --codec with a local folder or file")
    assert found == str(cached)


REFUSALS = {
    "some/gated": (403, "GatedRepo", "some/gated is gated: accept its terms at"),
    "some/private": (401, "RepoNotFound", "there is no folder some/private here and no repository"),
    "some/gone": (404, "RepoNotFound", "there is no folder some/gone here and no repository"),
    "some/words": (404, "EntryNotFound", "lacks a file that it needs"),
    "some/error": (400, "", "some/error cannot be downloaded:"),
}


class Refusing(http.server.BaseHTTPRequestHandler):
    """A reachable hub that refuses every file."""

    def do_HEAD(self):
        repo = "/".join(self.path.split("/")[1:3])
        status, code, _ = REFUSALS.get(repo, (200, "", ""))
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", "no")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_GET(self):
        self.do_HEAD()

    def log_message(self, *args):
        pass


@pytest.mark.slow
def test_refusals_of_the_hub(tmp_path):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        endpoint = f"http://127.0.0.1:{server.server_port}"
        try:
            texts = run_client(tmp_path, *REFUSALS, HF_ENDPOINT=endpoint)
        finally:
            server.shutdown()
            thread.join()
    for text, (_, _, expected) in zip(texts, REFUSALS.values(), strict=True):
        assert expected in text
