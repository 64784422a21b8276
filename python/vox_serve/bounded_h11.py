"""h11's parser of HTTP/1.1, with bounds on what a request's framing costs."""

from typing import Any

import h11

MAX_SMALL_CHUNKS = 1024
"""Chunks that any body may have. Each takes 40 microseconds of the event loop, even if it holds a
single byte."""

MIN_CHUNK_BYTES = 1024
"""Each so many bytes of a body allow one chunk more."""


class BoundedConnection(h11.Connection):
    """A server's connection that refuses bodies in too many chunks."""

    def __init__(self, max_head_bytes: int) -> None:
        super().__init__(h11.SERVER, max_head_bytes)
        self._num_chunks = self._num_bytes = 0  # of the request that is being read

    def next_event(self) -> Any:
        """The next event of the request; see h11.

        Raises:
            h11.RemoteProtocolError: the request is malformed, or has too many chunks.
        """
        event = super().next_event()
        if isinstance(event, h11.Request):
            self._num_chunks = self._num_bytes = 0
        elif isinstance(event, h11.Data):
            self._num_chunks += event.chunk_start
            self._num_bytes += len(event.data)
            if self._num_chunks > MAX_SMALL_CHUNKS + self._num_bytes // MIN_CHUNK_BYTES:
                raise h11.RemoteProtocolError("the body has too many small chunks")
        return event
