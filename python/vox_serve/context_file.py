"""Context segments: the model folder's own speakers, or a context.json."""

import io
import math
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from vox_serve.config import ModelSettings
from vox_serve.context_segment import ContextError, Place, check_segment
from vox_serve.json_file import read_json_file, refuse_special, shown
from vox_serve.mimi import Mimi
from vox_serve.model_config import CsmConfig
from vox_serve.prompt import Segment, check_codes, check_codes_shape
from vox_serve.prompt_audio import PromptOptions, clean_prompt
from vox_serve.recording import Limits, decode, read_audio

# Transcripts of the two recordings in sesame/csm-1b, its speakers 0 and 1.
DEFAULT_PROMPTS = (
    (
        "prompts/conversational_a.wav",
        "like revising for an exam I'd have to try and like keep up the momentum because I'd "
        "start really early I'd be like okay I'm gonna start revising now and then like you're "
        "revising for ages and then I just like start losing steam I didn't do that for the exam "
        "we had recently to be fair that was a more of a last minute scenario but like yeah I'm "
        "trying to like yeah I noticed this yesterday that like Mondays I sort of start the day "
        "with this not like a panic but like a",
    ),
    (
        "prompts/conversational_b.wav",
        "like a super Mario level. Like it's very like high detail. And like, once you get into "
        "the park, it just like, everything looks like a computer game and they have all these, "
        "like, you know, if, if there's like a, you know, like in a Mario game, they will have "
        "like a question block. And if you like, you know, punch it, a coin will come out. So "
        "like everyone, when they come into the park, they get like this little bracelet and then "
        "you can go punching question blocks around.",
    ),
)

DEFAULT_MAX_TEXT_CHARS: int = ModelSettings.model_fields["max_text_chars"].default
_NPY_HEADER_BYTES = 16_384  # numpy writes 128 and reads no more than 10,000


def default_context(folder: Path | str, mimi: Mimi, config: CsmConfig) -> list[Segment]:
    """The model folder's own two speakers, encoded; [] unless both recordings exist.

    The recordings are encoded as they are, as other implementations of CSM do.

    Args:
        folder: the model's folder.
        mimi: encodes the recordings.
        config: the model's sizes.

    Raises:
        ContextError: a recording cannot be read.
    """
    paths = [Path(folder) / name for name, _ in DEFAULT_PROMPTS]
    if not all(path.is_file() for path in paths):
        return []
    return [
        Segment(speaker, text, _encode(path, mimi, config, as_it_is=True))
        for speaker, (path, (_, text)) in enumerate(zip(paths, DEFAULT_PROMPTS, strict=True))
    ]


def load_context(
    path: Path | str,
    mimi: Mimi,
    config: CsmConfig,
    max_text_chars: int = DEFAULT_MAX_TEXT_CHARS,
) -> list[Segment]:
    """Read a context.json.

    The file is a list of `{"speaker": 0, "text": "...", "audio": "a.wav"}`, or with
    `"codes": "a.npy"` (int64 `[N, K]`) instead of the audio. Paths are relative to the file.
    `vox_serve.prompt_audio` cleans the audio.

    Args:
        path: the file.
        mimi: encodes the audio.
        config: the model's sizes. A recording or a file of codes may fill its context, and not
            more.
        max_text_chars: longest text of a segment.

    Returns:
        The segments in the file's order, codes `[N, K]` int64 each.

    Raises:
        ContextError: the file or an entry is invalid.
    """
    path = Path(path)
    try:
        entries = read_json_file(path, any_kind=True)
    except FileNotFoundError:
        raise ContextError(f"{path}: there is no such file") from None
    except (OSError, ValueError) as error:
        raise ContextError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(entries, list):
        raise ContextError(f"{path}: must be a list of segments")
    if len(entries) > config.backbone.max_positions:
        raise ContextError(
            f"{path}: has {len(entries)} segments, more than the model's context of "
            f"{config.backbone.max_positions} positions"
        )
    segments: list[Segment] = []
    num_frames = 0
    for i, entry in enumerate(entries):
        where = f"{path}, entry {i}"
        segments.append(_segment(entry, where, path.parent, mimi, config, max_text_chars))
        if (codes := segments[-1].codes) is not None:
            num_frames += len(codes)
        if num_frames > config.backbone.max_positions:  # many entries may name one file
            raise ContextError(
                f"{where}: the segments up to here have {num_frames} frames, more than the model's "
                f"context of {config.backbone.max_positions} positions"
            )
    return segments


def _segment(
    entry: Any, where: str, folder: Path, mimi: Mimi, config: CsmConfig, max_text_chars: int
) -> Segment:
    fields = check_segment(entry, Place(f"{where}: ", f"{where}: "), max_text_chars)
    field, name = fields.kind, fields.speech
    if not isinstance(name, str) or not name:
        raise ContextError(f"{where}: {field} must be the path of a file, got {shown(name)}")
    file = folder / name
    try:
        codes = _read_codes(file, config) if field == "codes" else _encode(file, mimi, config)
    except ContextError as error:
        raise ContextError(f"{where}: {field}: {error}") from None
    return Segment(fields.speaker, fields.text, codes)


def _encode(path: Path, mimi: Mimi, config: CsmConfig, as_it_is: bool = False) -> Tensor:
    # One frame of codes takes one position.
    sizes = mimi.config
    rate_hz = sizes.sample_rate_hz
    max_s = config.backbone.max_positions * sizes.frame_samples / rate_hz
    try:
        if as_it_is:
            samples = read_audio(path, rate_hz, max_s)
        else:
            recording = decode(path, Limits(max_s=max_s))
            samples = clean_prompt(
                recording, rate_hz, sizes.frame_samples, PromptOptions(max_s=max_s)
            )
        audio = torch.from_numpy(samples)
        return mimi.encode(audio[None].to(mimi.device), config.num_codebooks)[0].cpu()
    except (OSError, ValueError) as error:
        raise ContextError(str(error)) from None


def _read_codes(path: Path, config: CsmConfig) -> Tensor:
    """Codes of a .npy file, whose header is checked before the rest is read."""
    try:
        refuse_special(path)
        with open(path, "rb") as file:
            shape, is_fortran, dtype = _npy_header(file)
            check_codes_shape(str(dtype), shape, config)
            most = config.backbone.max_positions
            if not 0 <= shape[0] <= most:
                raise ValueError(f"it has {shape[0]} frames, the model's context {most} positions")
            num_bytes = math.prod(shape) * dtype.itemsize
            data = file.read(num_bytes)
        if len(data) < num_bytes:
            raise ValueError("it is cut short")
        codes = np.frombuffer(data, dtype).reshape(shape, order="F" if is_fortran else "C")
        tensor = torch.from_numpy(np.array(codes, order="C"))
        check_codes(tensor, config)
    except FileNotFoundError:
        raise ContextError(f"{path}: there is no such file") from None
    except (OSError, ValueError) as error:
        raise ContextError(f"{path}: {error}") from None
    return tensor


def _npy_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, Fortran order and dtype of an open .npy file, which is left at its first element."""
    head = io.BytesIO(file.read(_NPY_HEADER_BYTES))
    if head.getvalue().startswith(b"PK\x03\x04"):
        raise ValueError("it holds several arrays")
    try:
        version = np.lib.format.read_magic(head)
        read = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }.get(version)
        if read is None:
            raise ValueError(f"version {version} is not supported")
        found = read(head)
    except Exception as error:  # numpy evaluates the header: which errors depends on the bytes
        raise ValueError(f"it is no .npy file: {str(error)[:200]}") from None
    file.seek(head.tell())
    return found
