"""Errors of a model that cannot be found or downloaded, each one line that says what to do."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vox_serve.hub import _Hub


class ModelNotFoundError(FileNotFoundError):
    """A model or codec is unavailable; the message is one line that says what to do."""


class FileMissingError(ModelNotFoundError):
    """The repository exists but lacks a file."""


class Explained:
    """Turns errors of the hub's client into a `ModelNotFoundError`."""

    def __init__(self, hub: "_Hub"):
        self.hub = hub

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, Exception) and not isinstance(error, ModelNotFoundError):
            raise _explained(self.hub, error) from None


def _explained(hub: "_Hub", error: BaseException) -> ModelNotFoundError:
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
