"""Resolves a model's name to a local folder, downloading it if necessary."""

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from vox_serve.adapter_config import CONFIG_FILE
from vox_serve.checkpoint import (
    ADAPTER_FILE,
    ADAPTER_PICKLE,
    CODEC_FILE_PATTERNS,
    WEIGHT_SUFFIXES,
    CheckpointError,
    only_pickled,
    pickled_entry,
    read_json,
    shard_names,
    weights_entry,
)
from vox_serve.config import DEFAULT_CODEC
from vox_serve.hub_errors import Explained
from vox_serve.hub_errors import FileMissingError as FileMissingError
from vox_serve.hub_errors import ModelNotFoundError as ModelNotFoundError
from vox_serve.json_file import MAX_JSON_BYTES, MAX_TOKENIZER_BYTES

BUILT_IN_VOICES = Path(__file__).parent / "builtin"
"""Holds one folder for each voice in the package."""

REACH_TIMEOUT_S = 5.0

GGUF_SUFFIX = ".gguf"

_WEIGHTS = [f"*{suffix}" for suffix in (GGUF_SUFFIX, *WEIGHT_SUFFIXES)]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_TOKENIZER_PATTERNS = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
_SETTINGS_PATTERNS = (
    "config.json",
    CONFIG_FILE,  # tells that it is an adapter, no model
    "generation_config.json",
    *_TOKENIZER_PATTERNS,
    "prompts/conversational_*.wav",
)


def resolve_model(name: str) -> Path:
    """The folder or GGUF file of a model, downloaded from the Hugging Face hub if it is not local.

    If a repository holds the model in several formats, only one is downloaded: transformers' before
    the original, and GGUF if there is no other or a file is named. With `HF_HUB_OFFLINE=1`, or
    without a network, only the local cache is searched.

    Args:
        name: a built-in voice, a local folder or GGUF file, a hub id such as `sesame/csm-1b`, or a
            hub id with a GGUF file or the end of its name, such as `cstr/csm-1b-GGUF:q8_0`.

    Raises:
        ModelNotFoundError: it is none of these, or cannot be downloaded.
    """
    if name in built_in_voices():
        return BUILT_IN_VOICES / name
    if path := _local(name):
        if path.is_dir() or path.suffix == GGUF_SUFFIX:
            return path
        raise ModelNotFoundError(f"{name} is a file: give the folder that contains it")
    repo, _, wanted = name.partition(":")
    if not _HUB_ID.fullmatch(repo):
        raise ModelNotFoundError(
            f"no model {name!r}: it is no folder, no built-in voice "
            f"({', '.join(built_in_voices()) or 'this installation has none'}) and no hub id such "
            "as sesame/csm-1b"
        )
    hub = _Hub(repo, "a local folder", needs_settings=False)
    patterns = [*_SETTINGS_PATTERNS, *_weight_patterns(hub), *CODEC_FILE_PATTERNS]
    folder = None
    if hub.settings and not wanted:
        folder = hub.snapshot(patterns)
        if weights_entry(hub.settings, _relative_names(folder)):
            return folder
    try:
        sizes = hub.sizes(_WEIGHTS)
    except ModelNotFoundError:
        if wanted:
            raise
        sizes = {}
    names = [name for name in sizes if name.endswith(GGUF_SUFFIX)]
    # Some models come without config.json, and so do adapters.
    is_model = bool(wanted or names or any(name.endswith(".safetensors") for name in sizes))
    if not is_model and (pickled := pickled_entry(sizes)):
        raise ModelNotFoundError(
            f"{repo} has only {pickled}, a pickle file, which is not downloaded: download it, and "
            "give its folder with --allow_pickle if you trust it"
        )
    if not is_model and not hub.settings:
        hub.file("config.json")  # names it as missing
    if not names and not wanted:
        return folder or hub.snapshot(patterns)
    file = choose_gguf(repo, names, wanted)
    return hub.snapshot([*_SETTINGS_PATTERNS, *CODEC_FILE_PATTERNS, file]) / file


def choose_gguf(repo: str, names: Sequence[str], wanted: str) -> str:
    """The GGUF file of a repository that is meant.

    Args:
        repo: the repository's id.
        names: its GGUF files.
        wanted: a file's name, or the end of one without its suffix, in lower or upper case; empty
            for the only one.

    Raises:
        ModelNotFoundError: it is none of them, or several.
    """
    end = wanted.lower().removesuffix(GGUF_SUFFIX)
    found = [name for name in names if _ends(name.lower().removesuffix(GGUF_SUFFIX), end)]
    exact = [name for name in names if name == wanted]
    if len(exact or found) == 1:
        return (exact or found)[0]
    some = ", ".join(sorted(found or names)[:8]) or "none"
    what = f"has no GGUF file {wanted}" if wanted and not found else "has several GGUF files"
    raise ModelNotFoundError(f"{repo} {what}: give one as {repo}:FILE; it has {some}")


def _ends(stem: str, end: str) -> bool:
    """True if a name ends with whole words: csm-1b-q8_0 with q8_0, not with 8_0."""
    rest = stem.removesuffix(end)
    return not end or (stem.endswith(end) and not rest[-1:].isalnum() and rest[-1:] != "_")


def resolve_codec(name: str | None = None) -> Path:
    """The file or folder of a Mimi codec, downloaded from the Hugging Face hub if it is not local.

    Args:
        name: a local file or folder, or a hub id; None for `kyutai/mimi`.

    Raises:
        ModelNotFoundError: it is none of these, or cannot be downloaded.
    """
    name = DEFAULT_CODEC if name is None else name
    if path := _local(name):
        return path
    if not _HUB_ID.fullmatch(name):
        raise ModelNotFoundError(
            f"no codec {name!r}: it is no file, no folder and no hub id such as {DEFAULT_CODEC}"
        )
    hub = _Hub(name, "--codec with a local folder or file", needs_settings=False)
    # moshi's repositories also hold its language model, under the name of a Mimi's weights.
    is_mimi = hub.settings.get("model_type") == "mimi"
    weights = ["model.safetensors"] if is_mimi else CODEC_FILE_PATTERNS
    return hub.snapshot(["config.json", *weights])


def local_model(name: str) -> Path | None:
    """The built-in voice's folder, or the local folder or file, of this name; None without one."""
    return BUILT_IN_VOICES / name if name in built_in_voices() else _local(name)


def open_repository(name: str) -> tuple["_Hub", str]:
    """A repository, and what follows the colon of its name: see `resolve_model`.

    Raises:
        ModelNotFoundError: there is none.
    """
    repo, _, wanted = name.partition(":")
    if not _HUB_ID.fullmatch(repo):
        resolve_model(name)  # says what is wrong with it
    return _Hub(repo, "a local folder", needs_settings=False), wanted


def resolve_adapter(name: str, allow_pickle: bool = False) -> Path:
    """The folder of a LoRA adapter, downloaded from the Hugging Face hub if it is not local.

    Args:
        name: a local folder or a hub id.
        allow_pickle: download adapter_model.bin if there is no safetensors file.

    Raises:
        ModelNotFoundError: it is none of these, or cannot be downloaded.
    """
    if path := _local(name):
        if path.is_dir():
            return path
        raise ModelNotFoundError(f"{name} is a file: give the adapter's folder")
    if not _HUB_ID.fullmatch(name):
        raise ModelNotFoundError(f"no adapter {name!r}: it is no folder and no hub id")
    hub = _Hub(name, "--adapter with a local folder", needs_settings=None)
    sizes = hub.sizes([ADAPTER_FILE, ADAPTER_PICKLE])
    weights = ADAPTER_PICKLE if list(sizes) == [ADAPTER_PICKLE] else ADAPTER_FILE
    if weights == ADAPTER_PICKLE and not allow_pickle:
        raise ModelNotFoundError(f"{name} {only_pickled(ADAPTER_PICKLE)}")
    return hub.snapshot([CONFIG_FILE, weights, *_TOKENIZER_PATTERNS])


def resolve_tokenizer(name: str) -> Path:
    """The folder of a tokenizer, downloaded from the Hugging Face hub if it is not local.

    Args:
        name: a local folder, a tokenizer.json, or a hub id such as `unsloth/Llama-3.2-1B`.

    Raises:
        ModelNotFoundError: it is none of these, or cannot be downloaded.
    """
    if path := _local(name):
        if path.is_dir() or path.name == "tokenizer.json":
            return path if path.is_dir() else path.parent
        raise ModelNotFoundError(f"{name} is no tokenizer.json: give that file or its folder")
    if not _HUB_ID.fullmatch(name):
        raise ModelNotFoundError(f"no tokenizer {name!r}: it is no folder, no file and no hub id")
    hub = _Hub(name, "--tokenizer with a local folder", needs_settings=None)
    return hub.snapshot(_TOKENIZER_PATTERNS)


def built_in_voices() -> list[str]:
    """Names of the voices in the package."""
    if not BUILT_IN_VOICES.is_dir():
        return []
    return sorted(path.name for path in BUILT_IN_VOICES.iterdir() if path.is_dir())


def _local(name: str) -> Path | None:
    """The local file or folder of this name, if it exists."""
    try:
        path = Path(name).expanduser()
        return path if name.strip() and path.exists() else None
    except (OSError, RuntimeError, ValueError):  # too long, an unknown user's home, a zero byte
        return None


def _relative_names(folder: Path) -> list[str]:
    """The files in a folder and below, relative to it."""
    return [str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()]


def _weight_patterns(hub: "_Hub") -> list[str]:
    """Patterns of the weight files: those that config.json names, else all safetensors files."""
    entry = hub.settings.get("transformers_weights")
    if not isinstance(entry, str):
        return ["*.safetensors", "*.safetensors.index.json"]
    if not entry.endswith(".json"):
        return [entry]
    try:
        index = read_json(hub.file(entry))
        folder = entry.rpartition("/")[0]
        return [entry, *(f"{folder}/{n}" if folder else n for n in shard_names(index, entry))]
    except CheckpointError as error:
        raise ModelNotFoundError(f"{hub.repo}: {error}") from None


class _Hub:
    """One repository on the hub, or its part in the local cache.

    Args:
        repo: the repository's id.
        instead: an alternative to a hub id, for messages.
        needs_settings: whether a repository without config.json is an error; None not to read it.

    Attributes:
        settings: config.json, parsed; empty without one.
    """

    def __init__(self, repo: str, instead: str, needs_settings: bool | None = True):
        from huggingface_hub import constants

        self.repo = repo
        self.instead = instead
        self.endpoint = constants.ENDPOINT
        self.is_forbidden = bool(constants.HF_HUB_OFFLINE)
        # Without this check, the hub's client would retry for half a minute.
        self.is_offline = self.is_forbidden or not _is_reachable(self.endpoint)
        self.settings: dict[str, Any] = {}
        if needs_settings is None:
            return
        try:
            self.settings = read_json(self.file("config.json"))
        except ModelNotFoundError as error:
            if needs_settings or not (isinstance(error, FileMissingError) or self._is_cached()):
                raise

    def file(self, name: str) -> Path:
        """Download one file of the repository."""
        from huggingface_hub import hf_hub_download

        with Explained(self):
            if not self.is_offline:
                self._check_sizes([hf_hub_download(self.repo, name, dry_run=True)])
            return Path(hf_hub_download(self.repo, name, local_files_only=self.is_offline))

    def sizes(self, patterns: Sequence[str]) -> dict[str, int | None]:
        """Bytes of the repository's files that match the patterns; offline, of those in the local
        cache."""
        from huggingface_hub import snapshot_download
        from huggingface_hub.utils import filter_repo_objects

        with Explained(self):
            if not self.is_offline:
                files = snapshot_download(self.repo, allow_patterns=list(patterns), dry_run=True)
                return {file.filename: file.file_size for file in files}
            folder = Path(snapshot_download(self.repo, local_files_only=True))
            names = filter_repo_objects(_relative_names(folder), allow_patterns=list(patterns))
            return {name: (folder / name).stat().st_size for name in names}

    def open(self, name: str) -> IO[bytes]:
        """Open a file for reading from its start: the local cache's, or only the bytes read."""
        from huggingface_hub import try_to_load_from_cache

        from vox_serve.remote_file import RemoteFile

        cached = try_to_load_from_cache(self.repo, name)
        if isinstance(cached, str):
            return open(cached, "rb")
        with Explained(self):
            return RemoteFile(self.repo, name)  # type: ignore[return-value]

    def _is_cached(self) -> bool:
        """True if there is no network, but the local cache has a part of the repository."""
        from huggingface_hub import snapshot_download

        try:
            return self.is_offline and bool(snapshot_download(self.repo, local_files_only=True))
        except Exception:  # which errors mean "not there" depends on the client's version
            return False

    def snapshot(self, patterns: Sequence[str]) -> Path:
        """Download the files that match the patterns; returns their folder."""
        from huggingface_hub import snapshot_download

        with Explained(self):
            wanted = list(patterns)
            if not self.is_offline:
                files = snapshot_download(self.repo, allow_patterns=wanted, dry_run=True)
                self._check_sizes(files)
            return Path(
                snapshot_download(
                    self.repo, allow_patterns=wanted, local_files_only=self.is_offline
                )
            )

    def _check_sizes(self, files: Sequence[Any]) -> None:
        """Refuse to download what would not be read, or does not fit the disk.

        Args:
            files: the client's descriptions of files (`DryRunFileInfo`).
        """
        for file in files:
            limit = _max_bytes(file.filename)
            if limit is not None and (file.file_size or 0) > limit:
                raise ModelNotFoundError(
                    f"{self.repo}: {file.filename} has {file.file_size} bytes, read are at most "
                    f"{limit}"
                )
        needed = sum(file.file_size or 0 for file in files if file.will_download)
        if needed > (free := _free_bytes()):
            raise ModelNotFoundError(
                f"{self.repo} needs {needed / 1e9:.1f} GB, but the hub's cache folder has "
                f"{free / 1e9:.1f} GB free"
            )


def _max_bytes(name: str) -> int | None:
    """The longest file of this name that is read; None for weights, which only the disk bounds."""
    if name.rpartition("/")[2] == "tokenizer.json":
        return MAX_TOKENIZER_BYTES
    return MAX_JSON_BYTES if name.endswith(".json") else None


def _free_bytes() -> int:
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE)
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _is_reachable(endpoint: str) -> bool:
    """True if the endpoint answers; uses the proxies in the environment variables."""
    from huggingface_hub import get_session

    try:
        get_session().head(endpoint, timeout=REACH_TIMEOUT_S)
    except Exception:  # the HTTP library, and so its errors, depends on the client's version
        return False
    return True
