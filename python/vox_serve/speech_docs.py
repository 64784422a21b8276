"""The OpenAPI documentation of the routes that speak."""

from collections.abc import Callable
from typing import Any

from vox_serve.config import Config
from vox_serve.formats import FORMATS
from vox_serve.speech_fields import form_schema, request_model

Schema = dict[str, Any]


def request_body(
    config: Config, shape: Callable[[Schema], Schema] = lambda schema: schema
) -> Schema:
    """A body's documentation, with this server's limits.

    Args:
        config: the settings.
        shape: changes the schema of /generate's fields to the route's.
    """
    schema = request_model(config.speaker_limit).model_json_schema()
    schema["properties"]["max_frames"]["anyOf"][0]["maximum"] = config.frames_limit
    schema = shape(schema)
    form = form_schema(schema)
    files = {"type": "array", "items": {"type": "string", "format": "binary"}}
    multipart = {**form, "properties": {**form["properties"], "audio": files}}
    content = {
        "application/json": {"schema": schema},
        "application/x-www-form-urlencoded": {"schema": form},
        "multipart/form-data": {"schema": multipart},
    }
    return {"requestBody": {"required": True, "content": content}}


def speech_responses(*media_types: str) -> dict[int | str, Schema]:
    """The documentation of the responses; `media_types` come beside those of audio."""
    types = [*(format.media_type for format in FORMATS.values()), *media_types]
    return {
        200: {
            "description": "mono audio, by default a 24 kHz 16-bit WAV",
            "content": {media_type: {} for media_type in types},
        },
        **_ERRORS,
    }


_ERRORS: dict[int | str, Schema] = {
    400: {"description": "the body cannot be read, or the format is not supported"},
    401: {"description": "the API key is missing or wrong"},
    403: {
        "description": "the request comes from a web page of another origin, or names another host"
    },
    404: {"description": "there is no such voice, or the conversation was deleted meanwhile"},
    413: {"description": "the body or the context is too long"},
    415: {"description": "the body is neither JSON nor a form"},
    422: {"description": "a field is invalid, or the text too long for the model's context"},
    429: {"description": "too many requests wait; Retry-After says when to try again"},
    500: {"description": "the request failed"},
    503: {"description": "the engine stopped, or the server is shutting down"},
    501: {"description": "PyAV, which makes this format, is not installed"},
}
