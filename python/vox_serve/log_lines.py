"""Lines of the log: text, or a JSON object each; both name the request that they belong to."""

import json
import logging
import time

from vox_serve.request_id import current_id


def json_line(
    level: str, logger: str, message: str, when_s: float | None = None, **fields: object
) -> str:
    """One line of a JSON log.

    Args:
        level, logger, message: of the line.
        when_s: seconds since 1970; None for now.
        fields: further ones; those that are "" or None are left out.
    """
    when_s = time.time() if when_s is None else when_s
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(when_s))
    line = {
        "time": f"{stamp}.{int(when_s % 1 * 1000):03}Z",
        "level": level.lower(),
        "logger": logger,
        "message": message,
    }
    given = {name: value for name, value in fields.items() if value not in ("", None)}
    return json.dumps(line | given, default=str)


class TextLines(logging.Formatter):
    """Appends the request's id to the first line of a message that does not name it.

    Args:
        inner: formats the message.
    """

    def __init__(self, inner: logging.Formatter | None) -> None:
        super().__init__()
        self._inner = inner or logging.Formatter()

    def format(self, record: logging.LogRecord) -> str:
        text = self._inner.format(record)
        name = current_id()
        if not name or name in record.getMessage():
            return text
        first, newline, rest = text.partition("\n")
        return f"{first} [{name}]{newline}{rest}"


class JsonLines(logging.Formatter):
    """Formats a message as an object with `time`, `level`, `logger`, `message` and, where they
    exist, `request_id`, `exception`, and the access log's `client`, `method`, `path`, `status`.
    """

    def format(self, record: logging.LogRecord) -> str:
        name = getattr(record, "request_id", "") or current_id()
        fields: dict[str, object] = {"request_id": name}
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        if record.name == "uvicorn.access" and isinstance(record.args, tuple):
            client, method, path, _, status = record.args
            fields |= {"client": client, "method": method, "path": path, "status": status}
        return json_line(
            record.levelname, record.name, record.getMessage(), record.created, **fields
        )
