"""The answers to requests that raise an error."""

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError

from vox_serve.context_field import ContextTooLargeError
from vox_serve.context_segment import ContextError
from vox_serve.formats import FormatError
from vox_serve.http_io import AsciiJSONResponse
from vox_serve.job import QueueFull, RequestFailed, RequestRefused, Unavailable

MAX_SHOWN_ERRORS = 20

MAX_DETAIL_CHARS = 500
"""Longest message of an error, which may quote what the client sent."""


def shortened(error: object) -> str:
    """An error's message, with its middle left out if it is too long."""
    text = str(error)
    half = MAX_DETAIL_CHARS // 2
    return text if len(text) <= MAX_DETAIL_CHARS else f"{text[:half]} ... {text[-half:]}"


def add_error_handlers(app: FastAPI) -> None:
    """Make every error response `{"detail": ...}`."""

    @app.exception_handler(RequestValidationError)
    async def wrong_field(_: Request, error: RequestValidationError) -> Response:
        # Leave out pydantic's `input` and `ctx`: they may hold megabytes, or values JSON cannot.
        detail = [
            {
                "loc": ["body", *(str(part)[:100] for part in item["loc"])],
                "msg": shortened(item["msg"]),
                "type": item["type"],
            }
            for item in error.errors()[:MAX_SHOWN_ERRORS]
        ]
        return AsciiJSONResponse({"detail": detail}, 422)

    @app.exception_handler(RequestRefused)
    async def refused(_: Request, error: RequestRefused) -> Response:
        return AsciiJSONResponse({"detail": shortened(error)}, 422)

    @app.exception_handler(FormatError)
    async def wrong_format(request: Request, error: FormatError) -> Response:
        request.state.param = error.param
        return AsciiJSONResponse({"detail": shortened(error)}, 400)

    @app.exception_handler(ContextError)
    async def wrong_context(_: Request, error: ContextError) -> Response:
        status_code = 413 if isinstance(error, ContextTooLargeError) else 422
        return AsciiJSONResponse({"detail": shortened(error)}, status_code)

    @app.exception_handler(Unavailable)
    async def unavailable(_: Request, error: Unavailable) -> Response:
        status_code = 429 if isinstance(error, QueueFull) else 503
        headers = {"Retry-After": str(error.retry_after_s)}
        return AsciiJSONResponse({"detail": shortened(error)}, status_code, headers)

    @app.exception_handler(RequestFailed)
    async def failed(_: Request, error: RequestFailed) -> Response:
        return AsciiJSONResponse({"detail": shortened(error)}, 500)

    @app.exception_handler(Exception)
    async def unexpected(_: Request, __: Exception) -> Response:
        return AsciiJSONResponse({"detail": "internal error"}, 500)
