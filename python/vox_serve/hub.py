"""Resolves a model's name to a local folder, downloading it if necessary."""

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vox_serve.checkpoint import CODEC_FILE_PATTERNS, CheckpointError, read_json, shard_names
from vox_serve.config import DEFAULT_CODEC
from vox_serve.json_file import MAX_JSON_BYTES, MAX_TOKENIZER_BYTES

BUILT_IN_VOICES = Path(__file__).parent / "builtin"
"""Holds one folder for each voice in the package."""

REACH_TIMEOUT_S = 5.0

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_SETTINGS_PATTERNS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "prompts/conversational_*.wav",
)


class ModelNotFoundError(FileNotFoundError):
    """A model or codec is unavailable; the message is one line that says what to do."""


class FileMissingError(ModelNotFoundError):
    """The repository exists but lacks a file."""


def resolve_model(name: str) -> Path:
    """The folder of a model, downloaded from the Hugging Face hub if it is not local.

    If a repository holds the model in two formats, only transformers' format is downloaded. With
    `HF_HUB_OFFLINE=1`, or without a network, only the local cache is searched.

    Args:
        name: a built-in voice, a local folder, or a hub id such as `sesame/csm-1b`.

    Raises:
        ModelNotFoundError: it is none of these, or cannot be downloaded.
    """
    if name in built_in_voices():
        return BUILT_IN_VOICES / name
    if path := _local(name):
        if path.is_dir():
            return path
        raise ModelNotFoundError(f"{name} is a file: give the folder that contains it")
    if not _HUB_ID.fullmatch(name):
        raise ModelNotFoundError(
            f"no model {name!r}: it is no folder, no built-in voice "
            f"({', '.join(built_in_voices()) or 'this installation has none'}) and no hub id such "
            "as sesame/csm-1b"
        )
    hub = _Hub(name, "a local folder")
    return hub.snapshot([*_SETTINGS_PATTERNS, *_weight_patterns(hub), *CODEC_FILE_PATTERNS])


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
        needs_settings: whether a repository without config.json is an error.
    """

    def __init__(self, repo: str, instead: str, needs_settings: bool = True):
        from huggingface_hub import constants

        self.repo = repo
        self.instead = instead
        self.endpoint = constants.ENDPOINT
        self.is_forbidden = bool(constants.HF_HUB_OFFLINE)
        # Without this check, the hub's client would retry for half a minute.
        self.is_offline = self.is_forbidden or not _is_reachable(self.endpoint)
        try:
            self.settings = read_json(self.file("config.json"))
        except FileMissingError:
            if needs_settings:
                raise
            self.settings = {}

    def file(self, name: str) -> Path:
        """Download one file of the repository."""
        from huggingface_hub import hf_hub_download

        with _Explained(self):
            if not self.is_offline:
                self._check_sizes([hf_hub_download(self.repo, name, dry_run=True)])
            return Path(hf_hub_download(self.repo, name, local_files_only=self.is_offline))

    def snapshot(self, patterns: Sequence[str]) -> Path:
        """Download the files that match the patterns; returns their folder."""
        from huggingface_hub import snapshot_download

        with _Explained(self):
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


class _Explained:
    """Turns errors of the hub's client into a `ModelNotFoundError`."""

    def __init__(self, hub: _Hub):
        self.hub = hub

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, Exception) and not isinstance(error, ModelNotFoundError):
            raise _explained(self.hub, error) from None


def _explained(hub: _Hub, error: BaseException) -> ModelNotFoundError:
    from huggingface_hub import errors

    repo, page = hub.repo, f"{hub.endpoint}/{hub.repo}"
    if isinstance(error, errors.GatedRepoError):
        return ModelNotFoundError(
            f"{repo} is gated: accept its terms at {page}, then log in with `hf auth login` or set "
            "HF_TOKEN"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return ModelNotFoundError(
            f"there is no folder {repo} here and no repository {page}; if it is private, log in "
            "with `hf auth login` or set HF_TOKEN"
        )
    if isinstance(error, OSError) and error.errno is not None:
        return ModelNotFoundError(f"{repo} cannot be stored: {error}")
    if hub.is_offline:
        why = "HF_HUB_OFFLINE is set" if hub.is_forbidden else f"{hub.endpoint} cannot be reached"
        return ModelNotFoundError(
            f"{repo} is no folder here, is not (wholly) in the local cache, and {why}: connect "
            f"once to download it, or give {hub.instead}"
        )
    if isinstance(error, errors.LocalEntryNotFoundError):  # a request failed
        error = error.__cause__ or error
    elif isinstance(error, errors.EntryNotFoundError):
        return FileMissingError(f"{page} lacks a file that it needs: {_first_line(error)}")
    return ModelNotFoundError(f"{repo} cannot be downloaded: {_first_line(error)}")


def _first_line(error: BaseException) -> str:
    lines = str(error).split("\n")
    return next((line.strip() for line in lines if line.strip()), type(error).__name__)


def _is_reachable(endpoint: str) -> bool:
    """True if the endpoint answers; uses the proxies in the environment variables."""
    from huggingface_hub import get_session

    try:
        get_session().head(endpoint, timeout=REACH_TIMEOUT_S)
    except Exception:  # the HTTP library, and so its errors, depends on the client's version
        return False
    return True
