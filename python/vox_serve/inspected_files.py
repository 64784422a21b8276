"""Reads what `models inspect` needs of a local folder or a repository: settings and headers."""

from pathlib import Path
from typing import IO, Any, Protocol

from vox_serve.checkpoint import CheckpointError, shard_names
from vox_serve.gguf_header import GgufHeader, parse_header
from vox_serve.json_file import MAX_JSON_BYTES, parse_json
from vox_serve.weight_headers import WeightHeader

_MAX_SHARDS = 1000


class ModelPlace(Protocol):
    """A folder or repository.

    Attributes:
        name: as the user gave it.
        file: the one file of it that is meant; None for all.
        path: of the local folder or file; None on the hub.
        sizes: bytes of each file by its path below the folder; None if unknown.
    """

    name: str
    file: str | None
    path: Path | None
    sizes: dict[str, int | None]

    def open(self, name: str) -> IO[bytes]:
        """Open a file for reading from its start; raises an OSError if it cannot be read."""
        ...


def json_object(place: ModelPlace, name: str) -> dict[str, Any]:
    """A JSON file's object; {} if there is none."""
    if name not in place.sizes:
        return {}
    try:
        with place.open(name) as file:
            data = file.read(MAX_JSON_BYTES + 1)
        if len(data) > MAX_JSON_BYTES:
            raise ValueError(f"it is longer than {MAX_JSON_BYTES} bytes")
        value = parse_json(data)
    except ValueError as error:
        raise CheckpointError(f"{name} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{name} must hold a JSON object")
    return value


def gguf_header(place: ModelPlace, name: str) -> tuple[GgufHeader, WeightHeader]:
    size = place.sizes.get(name)
    try:
        with place.open(name) as file:
            header = parse_header(file, 2**62 if size is None else size)
        return header, WeightHeader.of_gguf(Path(name), header)
    except ValueError as error:
        raise CheckpointError(f"{name} cannot be read as GGUF: {error}") from None


def safetensors_headers(place: ModelPlace, entry: str) -> list[WeightHeader]:
    names = [entry]
    if entry.endswith(".json"):
        names = shard_names(json_object(place, entry), entry)[:_MAX_SHARDS]
    headers = []
    for name in names:
        try:
            with place.open(name) as file:
                header = WeightHeader.of_safetensors(Path(name), file, place.sizes.get(name))
            headers.append(header)
        except FileNotFoundError:
            raise CheckpointError(f"{entry} names {name}, which does not exist") from None
        except ValueError as error:
            raise CheckpointError(f"{name} cannot be read as safetensors: {error}") from None
    return headers
