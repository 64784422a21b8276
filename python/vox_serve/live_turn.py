"""A turn of the WebSocket: its text as it comes, and its speech."""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from itertools import chain
from typing import Any

from fastapi import HTTPException

from vox_serve.conversation_service import Heard
from vox_serve.ending import FRAME_S
from vox_serve.formats import Output
from vox_serve.growing_text import GrowingText
from vox_serve.job import Job
from vox_serve.part_feed import PartFeed
from vox_serve.text.splitting import Part

PART_BYTES = 256
"""Memory of a sentence besides its text."""


class Turn:
    """One answer. Only the event loop uses it.

    Args:
        number: of the turn in its connection, from 1.
        session: how it is spoken.
        output: the audio that its client gets.
        text: takes its fragments.
        memory: its part of the memory for texts; see `BodyMemory`.

    Attributes:
        parts: sentences so far.
        feed: the same, for the engine; None before the first one.
        job: speaks it; None before it is submitted.
        num_frames: frames that were sent.
        is_written: no further text comes.
        timed_out: it ended since no text came.
        is_over: nothing more is sent for it; text that still comes is dropped.
        heard: what was heard before it was cancelled; None unless it was.
        waited_s: time that it kept its place while all its text was spoken; see `count_wait`.
    """

    def __init__(
        self,
        number: int,
        session: Any,
        output: Output,
        text: GrowingText,
        memory: AbstractContextManager[Callable[[int], None]],
    ) -> None:
        self.number = number
        self.session = session
        self.output = output
        self.parts: list[Part] = []
        self.feed: PartFeed | None = None
        self.job: Job | None = None
        self.num_frames = 0
        self.is_written = self.timed_out = self.is_over = False
        self.heard: Heard | None = None
        self.waited_s = self._counted_at_s = 0.0
        self._text = text
        self._memory = ExitStack()
        self._count = self._memory.enter_context(memory)
        self._begun = asyncio.Event()

    @property
    def num_samples(self) -> int:
        """Samples of the frames that were sent, at the output's rate."""
        return round(self.num_frames * FRAME_S * self.output.rate_hz)

    async def write(self, fragment: str) -> None:
        """Take the next fragment of the text; others run between its pieces.

        Raises:
            ValueError: see `GrowingText.add`.
            HTTPException: the texts of all turns take too much memory. The fragment is left out.
        """
        num_bytes = len(fragment) * (1 if fragment.isascii() else 4)
        try:
            self._count(num_bytes)
            pieces = self._text.pieces(fragment)
            first = next(pieces, [])
        except (HTTPException, ValueError):
            self._count(-num_bytes)
            raise
        num_parts = len(self.parts)
        for parts in chain([first], pieces):
            self._append(parts)
            await asyncio.sleep(0)
            if self.is_over:
                return
        with suppress(HTTPException):  # the next fragment is refused
            self._count(PART_BYTES * (len(self.parts) - num_parts))

    def forget(self) -> None:
        """Give the memory of the text back."""
        self._memory.close()

    def flush(self) -> None:
        """Let everything so far be spoken."""
        self._append(self._text.flush())

    def end(self) -> None:
        """Let the rest be spoken: the text is complete."""
        if not self.is_written:
            self.flush()
            self.is_written = True
            if self.feed is not None:
                self.feed.close()
            self._begun.set()

    @property
    def is_starved(self) -> bool:
        """True if it keeps its place and has nothing to speak."""
        return not self.is_over and self.feed is not None and self.feed.is_starved

    def count_wait(self, now_s: float) -> None:
        """Add the time since the last call, or since the text was spoken, to `waited_s`.

        Args:
            now_s: the time, by `time.monotonic`.
        """
        if self.feed is not None and self.is_starved:
            since_s = max(self._counted_at_s, self.feed.spoken_at_s)
            self.waited_s += max(0.0, now_s - since_s)
        self._counted_at_s = now_s

    async def begun(self) -> None:
        """Wait for the first sentence, or the end of the text."""
        await self._begun.wait()

    def _append(self, parts: Sequence[Part]) -> None:
        for part in parts:
            self.parts.append(part)
            if self.feed is None:
                self.feed = PartFeed(str(part))
                self._begun.set()
            else:
                self.feed.append(str(part))
