"""Changes the tempo of speech and keeps its pitch, with ffmpeg's `atempo`."""

import av
import numpy as np
from av.audio.frame import AudioFrame
from av.filter import Graph

from vox_serve.audio import SAMPLE_RATE_HZ

MIN_FACTOR, MAX_FACTOR = 0.5, 2.0
"""One filter's range; beyond it, `atempo` drops samples. Further ones follow for the rest."""


class Tempo:
    """A stage (see encoders.py) from 16-bit PCM at 24 kHz to the same, faster or slower.

    Args:
        speed: factor of the tempo, above 0.
    """

    def __init__(self, speed: float) -> None:
        self._graph = Graph()
        rate = str(SAMPLE_RATE_HZ)
        source = self._graph.add(
            "abuffer",
            sample_rate=rate,
            sample_fmt="s16",
            channel_layout="mono",
            time_base=f"1/{rate}",
        )
        nodes = [source]
        nodes += [self._graph.add("atempo", f"{factor:.9f}") for factor in _factors(speed)]
        nodes.append(self._graph.add("abuffersink"))
        self._graph.link_nodes(*nodes)
        self._graph.configure()
        self._num_samples = 0

    def feed(self, data: bytes) -> bytes:
        if not data:
            return b""
        samples = np.frombuffer(data, "<i2")[None]
        frame = AudioFrame.from_ndarray(samples, format="s16", layout="mono")
        frame.sample_rate = SAMPLE_RATE_HZ
        frame.pts = self._num_samples
        self._num_samples += samples.size
        self._graph.push(frame)
        return self._pull()

    def close(self) -> bytes:
        self._graph.push(None)
        return self._pull()

    def _pull(self) -> bytes:
        pieces: list[bytes] = []
        while True:
            try:
                frame = self._graph.pull()
            except (av.BlockingIOError, av.EOFError):
                return b"".join(pieces)
            assert isinstance(frame, AudioFrame)
            pieces.append(frame.to_ndarray().astype("<i2").tobytes())


def _factors(speed: float) -> list[float]:
    """Factors within a filter's range, whose product is `speed`."""
    factors = []
    for bound in (MIN_FACTOR, MAX_FACTOR):
        while (speed < bound) if bound < 1 else (speed > bound):
            factors.append(bound)
            speed /= bound
    return [*factors, speed]
