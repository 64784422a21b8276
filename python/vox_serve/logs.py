"""A log that does not repeat itself."""

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from vox_serve.log_lines import JsonLines, TextLines

LOGGERS = ("vox_serve", "uvicorn.error", "asyncio")
PATH_LOGGERS = ("uvicorn.access", "uvicorn.error")
"""Those that name the paths of requests; the latter, of WebSockets."""

MAX_KINDS = 1000
MAX_SHOWN_CHARS = 200


@dataclass
class _Kind:
    """Messages that differ in their arguments only."""

    since: float
    num_shown: int = 0
    num_hidden: int = 0
    last: str = ""


class RepeatFilter(logging.Filter):
    """Passes the first few warnings of a kind, then one line per period that counts the others.

    A kind is a logger, a level, the first line of a message before its arguments are filled in, and
    the type of the exception. Messages below a warning always pass.

    Args:
        period_s: time after which a kind is counted from zero again.
        num_first: messages of a kind that pass in each period.
    """

    def __init__(self, period_s: float = 60.0, num_first: int = 5):
        super().__init__()
        self.period_s = period_s
        self.num_first = num_first
        self._kinds: dict[tuple[object, ...], _Kind] = {}
        self._lock = threading.RLock()
        self._timer: threading.Timer | None = None

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno < logging.WARNING:
            return True
        error = record.exc_info[0] if record.exc_info else None
        text = str(record.msg).partition("\n")[0][:MAX_SHOWN_CHARS]
        with self._lock:
            key = (record.name, record.levelno, text, error)
            if key not in self._kinds and len(self._kinds) == MAX_KINDS:
                self._report()
            kind = self._kinds.setdefault(key, _Kind(time.monotonic()))
            if kind.num_hidden == 0 and time.monotonic() - kind.since > self.period_s:
                kind.since, kind.num_shown = time.monotonic(), 0
            if kind.num_shown < self.num_first:
                kind.num_shown += 1
                return True
            kind.num_hidden += 1
            kind.last = record.getMessage().partition("\n")[0]
            if self._timer is None:
                self._timer = threading.Timer(self.period_s, self.report)
                self._timer.daemon = True
                self._timer.start()
            return False

    def report(self) -> None:
        """Log the number of hidden messages of each kind, and count from zero again."""
        with self._lock:
            if self._timer:
                self._timer.cancel()
                self._timer = None
            self._report()

    def _report(self) -> None:
        for (name, level, *_), kind in self._kinds.items():
            if kind.num_hidden:
                line = f"{kind.num_hidden} more like this in {self.period_s:g} s: {kind.last}"
                logger = logging.getLogger(str(name))
                args = (name, level, __file__, 0, line, (), None)
                logger.callHandlers(logging.LogRecord(*args))  # type: ignore[arg-type]
        self._kinds.clear()


class ShortPaths(logging.Filter):
    """Shortens the paths in uvicorn's lines about requests: a client may send 16 kB.

    The part after a question mark is left out, since a client may put its text there.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        if isinstance(record.args, tuple):
            record.args = tuple(
                _shortened(arg) if isinstance(arg, str) else arg for arg in record.args
            )
        return True


def _shortened(path: str) -> str:
    path, _, query = path.partition("?")
    if query:
        path += "?..."
    return path if len(path) <= MAX_SHOWN_CHARS else f"{path[:MAX_SHOWN_CHARS]}..."


@contextmanager
def server_log(level: str, log_format: Literal["text", "json"] = "text") -> Iterator[None]:
    """Within the block, the log has the package's messages beside uvicorn's, with request ids.

    Repeated warnings become a count, and long paths short.

    Args:
        level: least severe messages of the package that are logged.
        log_format: lines of text, or of one JSON object each.
    """
    repeats, short_paths = RepeatFilter(), ShortPaths()
    ours, handlers = logging.getLogger("vox_serve"), logging.getLogger("uvicorn").handlers[:]
    previous_level = ours.level
    ours.setLevel(level.upper())
    for handler in handlers:
        ours.addHandler(handler)
    formatters = {}
    for handler in (*handlers, *logging.getLogger("uvicorn.access").handlers):
        formatters[handler] = handler.formatter
        is_json = log_format == "json"
        handler.setFormatter(JsonLines() if is_json else TextLines(handler.formatter))
    for name in LOGGERS:
        logging.getLogger(name).addFilter(repeats)
    for name in PATH_LOGGERS:
        logging.getLogger(name).addFilter(short_paths)
    try:
        yield
    finally:
        for name in LOGGERS:
            logging.getLogger(name).removeFilter(repeats)
        for name in PATH_LOGGERS:
            logging.getLogger(name).removeFilter(short_paths)
        repeats.report()
        for handler, formatter in formatters.items():
            handler.setFormatter(formatter)
        ours.setLevel(previous_level)
        for handler in handlers:
            ours.removeHandler(handler)
