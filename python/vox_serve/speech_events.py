"""Audio as server-sent events, with the names that OpenAI's speech API gives them."""

import json
from base64 import b64encode
from collections.abc import AsyncIterator
from typing import Any

from vox_serve.job import Job, ReaderStalled, RequestFailed, Unavailable
from vox_serve.openai_errors import error_object

EVENTS_TYPE = "text/event-stream"


async def as_events(job: Job, content: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """An event for each piece of a job's audio, and one at its end.

    The last one has `usage`: positions of the prompt, and frames of 80 ms. A failure is the event
    `error`, after which nothing follows.
    """
    try:
        async for piece in content:
            yield _event({"type": "speech.audio.delta", "audio": b64encode(piece).decode("ascii")})
    except (Unavailable, RequestFailed) as error:
        if not isinstance(error, ReaderStalled):
            status = 503 if isinstance(error, Unavailable) else 500
            yield _event({"type": "error", **error_object(status, str(error))})
        raise
    prompt = job.progress.prompt
    num_inputs = len(prompt.frames) if prompt is not None else 0
    usage = {
        "input_tokens": num_inputs,
        "output_tokens": job.num_frames,
        "total_tokens": num_inputs + job.num_frames,
    }
    done = {"type": "speech.audio.done", "usage": usage, "finish_reason": job.finish_reason}
    yield _event(done)


def _event(fields: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(fields)}\n\n".encode("ascii")
