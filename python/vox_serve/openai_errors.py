"""Gives the errors of all routes below /v1 OpenAI's shape too: `error` beside `detail`."""

import json
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vox_serve.http_io import AsciiJSONResponse, route_path

SPEECH_PATH = "/v1/audio/speech"

_CODES = {
    401: "invalid_api_key",
    404: "not_found",
    413: "request_too_large",
    429: "rate_limit_exceeded",
    503: "service_unavailable",
}


def error_object(
    status: int, message: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """`{"error": ...}` of a response with this status."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    if status == 429:
        kind = "rate_limit_error"
    error = {"message": message, "type": kind, "param": param, "code": code or _CODES.get(status)}
    return {"error": error}


def has_openai_shape(scope: Any) -> bool:
    """True if errors of a request have OpenAI's `error`."""
    return route_path(scope).startswith("/v1/")


class OpenAIErrors:
    """ASGI middleware that adds `error` to JSON bodies with `detail`.

    Of /v1/audio/speech, invalid fields are 400, as clients of OpenAI expect. A route or handler may
    name the field in the state of its request, as `param`, and give a `code`.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not has_openai_shape(scope):
            return await self.app(scope, receive, send)
        start: Message | None = None
        body = b""

        async def send_shaped(message: Message) -> None:
            nonlocal start, body
            if message["type"] == "http.response.start" and _is_json_error(message):
                start = message
            elif start is None or message["type"] != "http.response.body":
                await send(message)
            else:
                body += message.get("body", b"")
                if not message.get("more_body"):
                    await send_error(start, body)

        async def send_error(start: Message, body: bytes) -> None:
            status = start["status"]
            if status == 422 and route_path(scope) == SPEECH_PATH:
                status = 400
            fields = json.loads(body or b"null")  # of HEAD, there is no body
            if isinstance(fields, dict) and "detail" in fields and "error" not in fields:
                state = scope.get("state", {})
                text, param = _summary(fields["detail"])
                param = state.get("param", param)
                fields |= error_object(status, text, param, state.get("code"))
            content = bytes(AsciiJSONResponse(fields).body) if body else b""
            headers = MutableHeaders(raw=list(start["headers"]))
            if body:
                headers["content-length"] = str(len(content))
            await send({**start, "status": status, "headers": headers.raw})
            await send({"type": "http.response.body", "body": content})

        await self.app(scope, receive, send_shaped)


def _is_json_error(start: Message) -> bool:
    headers = Headers(raw=start["headers"])
    return start["status"] >= 400 and headers.get("content-type") == "application/json"


def _summary(detail: Any) -> tuple[str, str | None]:
    """One message for a detail, and the field that it is about."""
    if not isinstance(detail, list):
        return str(detail), None
    named = [([str(part) for part in item["loc"][1:]], item["msg"]) for item in detail]
    message = "; ".join(": ".join(filter(None, (".".join(loc), text))) for loc, text in named)
    return message, (named[0][0][0] if named and named[0][0] else None)
