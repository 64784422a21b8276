"""Speaks a text while it is being written: python examples/live_text.py out.wav < text"""

import asyncio
import json
import sys
import wave

from websockets.asyncio.client import connect

URL = "ws://localhost:8000/v1/audio/speech/stream"


async def speak(pieces, url=URL):
    """Yield 24 kHz 16-bit PCM while `pieces`, an async iterator of text, goes on."""
    async with connect(url) as socket:

        async def write():
            async for piece in pieces:
                await socket.send(json.dumps({"type": "text", "text": piece}))
            await socket.send(json.dumps({"type": "close"}))

        writing = asyncio.create_task(write())
        async for message in socket:
            if isinstance(message, bytes):
                yield message
            elif (event := json.loads(message))["type"] == "error":
                raise RuntimeError(event["message"])
        await writing


async def words():
    for word in sys.stdin.read().split():
        yield f"{word} "
        await asyncio.sleep(0.05)  # a language model's pace


async def main():
    with wave.open(sys.argv[1], "wb") as out:
        out.setparams((1, 2, 24000, 0, "NONE", ""))
        async for chunk in speak(words(), *sys.argv[2:]):
            out.writeframes(chunk)


if __name__ == "__main__":
    asyncio.run(main())
