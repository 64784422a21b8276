"""The bytes that an encoder makes of an utterance of `FakeEngine`."""

from fake_engine import expected_pcm
from vox_serve.encoders import open_encoder, open_shaper, open_stream
from vox_serve.formats import Output
from vox_serve.provenance import note_of

NOTE = note_of("demo")
FRAME_BYTES = 3840


def pieces_of(stage, pieces: list[bytes]) -> list[bytes]:
    """Feed a stage with some pieces, and close it."""
    return [*map(stage.feed, pieces), stage.close()]


def frames_of(text: str, num_frames: int) -> list[bytes]:
    """The frames of an uncut utterance."""
    pcm = expected_pcm(text, num_frames)
    return [pcm[i : i + FRAME_BYTES] for i in range(0, len(pcm), FRAME_BYTES)]


def streamed(text: str, num_frames: int, name: str, **options) -> bytes:
    """A streamed file of an uncut utterance."""
    stage = open_stream(Output.of(name, **options), NOTE)
    return b"".join(pieces_of(stage, frames_of(text, num_frames)))


def whole(text: str, num_frames: int, name: str, **options) -> bytes:
    """A whole file of an uncut utterance."""
    output = Output.of(name, **options)
    pieces = frames_of(text, num_frames)
    if (shaper := open_shaper(output)) is not None:
        pieces = [piece for piece in pieces_of(shaper, pieces) if piece]
    encoder = open_encoder(output, NOTE, sum(map(len, pieces)) // 2)
    return b"".join(pieces_of(encoder, pieces))
