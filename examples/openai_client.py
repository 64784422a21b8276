"""Saves speech as it arrives, with OpenAI's client: pip install openai

python examples/openai_client.py "Hello there." hello.mp3 [http://localhost:8000]
"""

import sys
import time
from pathlib import Path

from openai import OpenAI

text, path = sys.argv[1], Path(sys.argv[2])
server = sys.argv[3] if len(sys.argv) > 3 else "http://localhost:8000"
client = OpenAI(base_url=f"{server}/v1", api_key="none")
start = time.monotonic()
first_s = None
with (
    client.audio.speech.with_streaming_response.create(
        model="tts-1",
        voice="alloy",
        input=text,
        response_format=path.suffix[1:] or "mp3",  # type: ignore[arg-type]
    ) as response,
    path.open("wb") as file,
):
    for chunk in response.iter_bytes():
        first_s = first_s or time.monotonic() - start
        file.write(chunk)
print(f"first bytes after {first_s or 0:.3f} s, {path} after {time.monotonic() - start:.3f} s")
