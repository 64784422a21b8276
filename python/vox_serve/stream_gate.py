"""Which requests the server takes: a stream only if no listener hears a gap for it."""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from vox_serve.admission import can_admit
from vox_serve.line_pace import LinePace
from vox_serve.text_bound import frames_expected

if TYPE_CHECKING:
    from vox_serve.policy import Row
    from vox_serve.request import Request
    from vox_serve.speech_lengths import SpeechLengths
    from vox_serve.step_times import StepTimes


class Speaker(Protocol):
    """The part of the engine that tells how busy it is."""

    times: "StepTimes"
    lengths: "SpeechLengths"

    @property
    def rows(self) -> "list[Row]": ...


class StreamGate:
    """Decides by the requests that are spoken and by how long steps take. Any thread may use it.

    Args:
        engine: what is busy.
        max_wait_s: longest time that a stream should wait for its place.
        clock: the engine's.
    """

    def __init__(
        self, engine: Speaker, max_wait_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._engine, self.max_wait_s, self._clock = engine, max_wait_s, clock
        self._pace = LinePace()

    def is_open(self, request: "Request", streaming: bool) -> bool:
        """True if a request can be spoken beside those that are."""
        rows = self._engine.rows
        if not any(row.streams for row in rows):
            return True
        lengths = self._engine.lengths
        frames = lengths.expected(frames_expected(request.text))
        if request.max_frames is not None:
            frames = min(frames, request.max_frames)
        times = self._engine.times
        now_s = self._clock()
        spread, speed = lengths.spread, request.speed
        return can_admit(rows, now_s, times, streaming, frames, spread, speed)

    def wait_s(self, num_ahead: int) -> float:
        """Predicted seconds until a request that finds the gate closed gets its place."""
        engine = self._engine
        return self._pace.wait_s(engine.rows, self._clock(), engine.times, num_ahead)

    def admitted(self, num_waiting: int) -> None:
        """A stream got its place, and so many others wait still."""
        self._pace.admitted(self._clock(), num_waiting)
