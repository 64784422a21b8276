"""Encodes the samples of a file into another file."""

import tempfile
from typing import IO

from vox_serve.encoders import SAMPLE_BYTES, Stage, open_encoder, open_shaper
from vox_serve.formats import Output

MAX_MEMORY_BYTES = 2**24
"""A larger file is on disk."""

PIECE_BYTES = 2**16


def encode_file(pcm: IO[bytes], output: Output, note: str | None, folder: str | None) -> IO[bytes]:
    """Encode 16-bit PCM at 24 kHz.

    Args:
        pcm: a file of samples, which is read from its start.
        output: the format.
        note: see `open_encoder`.
        folder: of a temporary file; None for the system's.

    Returns:
        A temporary file, to be read from its start.

    Raises:
        OSError: the disk is full.
        ImportError: see `open_encoder`.
    """
    if (shaper := open_shaper(output)) is not None:
        pcm = _through(shaper, pcm, folder)
    pcm.seek(0, 2)
    return _through(open_encoder(output, note, pcm.tell() // SAMPLE_BYTES), pcm, folder)


def _through(stage: Stage, source: IO[bytes], folder: str | None) -> IO[bytes]:
    target = tempfile.SpooledTemporaryFile(MAX_MEMORY_BYTES, dir=folder)  # noqa: SIM115
    source.seek(0)
    while piece := source.read(PIECE_BYTES):
        target.write(stage.feed(piece))
    target.write(stage.close())
    return target
