"""An agent that talks: each line that you type is answered in speech while the answer is being
written, and the next line interrupts it.

python examples/agent_loop.py [ws://localhost:8000/v1/audio/speech/stream]

Needs `pip install websockets sounddevice`. Put your language model into `answer`.
"""

import asyncio
import json
import sys

import sounddevice
from websockets.asyncio.client import connect

URL = "ws://localhost:8000/v1/audio/speech/stream"
BYTES_PER_MS = 48  # of 24 kHz, 16 bit


async def answer(question):
    """The answer, in pieces as a language model writes them."""
    for word in f"You said: {question}".split():
        yield f"{word} "
        await asyncio.sleep(0.05)


class Speaker:
    """Plays PCM as it comes, and knows how much of it was heard."""

    def __init__(self):
        self.waiting = bytearray()
        self.num_played = 0
        options = {"samplerate": 24000, "channels": 1, "dtype": "int16"}
        self.stream = sounddevice.RawOutputStream(callback=self._fill, **options)
        self.stream.start()

    def _fill(self, out, frames, time, status):  # called by the device in a thread of its own
        data = bytes(self.waiting[: len(out)])
        del self.waiting[: len(data)]
        self.num_played += len(data)
        out[:] = data + bytes(len(out) - len(data))

    def stop(self):
        """Be silent; returns the milliseconds that were heard since the last call."""
        self.waiting.clear()
        played_ms, self.num_played = self.num_played // BYTES_PER_MS, 0
        return played_ms


async def write(socket, pieces):
    async for piece in pieces:
        await socket.send(json.dumps({"type": "text", "text": piece}))
    await socket.send(json.dumps({"type": "end"}))


async def listen(socket, speaker, state):
    """Play what the server sends, but nothing of turns that were cancelled."""
    async for message in socket:
        if isinstance(message, bytes):
            if not state["cancelling"]:
                speaker.waiting += message
            continue
        event = json.loads(message)
        if event["type"] == "sentence.begin":
            print(f"  {event['text']}", flush=True)
        elif event["type"] == "turn.done":
            state["turns"] -= 1
        elif event["type"] == "cancelled":
            state |= {"turns": 0, "cancelling": False}
        elif event["type"] == "error":  # or there was nothing to cancel yet
            print(f"error: {event['message']}", file=sys.stderr)
            state |= {"turns": 0, "cancelling": False}


async def main(url=URL):
    speaker, state, writing = Speaker(), {"turns": 0, "cancelling": False}, None
    async with connect(url) as socket:
        listening = asyncio.create_task(listen(socket, speaker, state))
        while line := await asyncio.to_thread(sys.stdin.readline):
            if state["turns"] or speaker.waiting:
                writing.cancel()
                state["cancelling"] = True
                cancel = {"type": "cancel", "played_ms": speaker.stop()}
                await socket.send(json.dumps(cancel))
                while state["cancelling"]:
                    await asyncio.sleep(0.01)
            speaker.num_played = 0
            state["turns"] += 1
            writing = asyncio.create_task(write(socket, answer(line.strip())))
        if writing:
            await asyncio.wait([writing])
        await socket.send(json.dumps({"type": "close"}))
        await listening
    while speaker.waiting:
        await asyncio.sleep(0.05)
    speaker.stream.stop()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
