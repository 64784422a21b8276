"""Text at a language model's pace over the WebSocket: first audio, gaps, equal samples.

    python bench/live.py [--url http://127.0.0.1:8000] [--runs N] [--rate TOKENS]

Four sentences are sent in pieces of four characters, about a token each, `--rate` of them a second.
The figures of each run, in milliseconds:

- `first_audio`: from the send that completes the first sentence (the first character of the second
  one) to the first audio.
- `http_first_audio`: of the first sentence as a streamed request to /generate, for comparison.
- `gap`: the longest time that a player waits for audio, and `gaps` all of them together.
- `last_audio`: from the last piece to the last audio.

Without `--url` a server with the built-in voice is started. The samples must be those of one
request to /generate with the same parts. The last line is JSON.
"""

import argparse
import asyncio
import contextlib
import http.client
import json
import os
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from websockets.asyncio.client import connect

ROOT = Path(__file__).parent.parent
SENTENCES = [
    "The river runs past our old house, and every morning we walk down to the bridge.",
    "My sister likes to watch the boats that carry stone or timber from the hills.",
    "Yesterday there were only three of them, because the water was very low.",
    "We counted the ducks instead, and went home before it began to rain.",
]
SPLIT_CHARS = 100
"""A setting of the server: longer than each sentence and shorter than the text, so that /generate
has the same parts."""
PIECE_CHARS = 4
FRAME_S = 0.08


@contextlib.contextmanager
def started() -> Iterator[str]:
    """The URL of a server of this checkout, stopped at the end."""
    command = [sys.executable, "-m", "vox_serve.launch", "--port=0", f"--split_chars={SPLIT_CHARS}"]
    path = os.pathsep.join([str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")])
    with subprocess.Popen(
        [*command, "--log_level=warning"],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        try:
            line = next(line for line in process.stdout if "ready at" in line)
            yield line.split("ready at ")[1].split()[0]
        finally:
            process.terminate()


async def run(url: str, seed: int, rate_hz: float) -> tuple[dict[str, float], bytes]:
    """One turn; returns its figures and samples."""
    text = " ".join(SENTENCES)
    pieces = [text[at : at + PIECE_CHARS] for at in range(0, len(text), PIECE_CHARS)]
    complete = (len(SENTENCES[0]) + 1) // PIECE_CHARS  # index of the piece that completes it
    sent_s: list[float] = []
    arrived: list[tuple[float, bytes]] = []
    async with connect(url.replace("http", "ws", 1) + "/v1/audio/speech/stream") as socket:
        await socket.send(json.dumps({"type": "session", "seed": seed}))
        assert json.loads(await socket.recv())["type"] == "ready"

        async def write() -> None:
            begin_s = time.monotonic()
            for number, piece in enumerate(pieces):
                await asyncio.sleep(max(0.0, begin_s + number / rate_hz - time.monotonic()))
                sent_s.append(time.monotonic())
                await socket.send(json.dumps({"type": "text", "text": piece}))
            await socket.send(json.dumps({"type": "end"}))

        writing = asyncio.create_task(write())
        async for message in socket:
            if isinstance(message, bytes):
                arrived.append((time.monotonic(), message))
            elif json.loads(message)["type"] in ("turn.done", "error"):
                assert json.loads(message).get("finish_reason") == "stop", message
                break
        await writing
    gaps_s = [0.0]
    due_s = arrived[0][0]
    for at_s, _ in arrived:
        gaps_s.append(max(0.0, at_s - due_s))
        due_s = max(due_s, at_s) + FRAME_S
    figures = {
        "first_audio": arrived[0][0] - sent_s[complete],
        "gap": max(gaps_s),
        "gaps": sum(gaps_s),
        "last_audio": arrived[-1][0] - sent_s[-1],
        "speech": len(arrived) * FRAME_S,
        "text": sent_s[-1] - sent_s[0],
    }
    ms = {name: round(value * 1000, 1) for name, value in figures.items()}
    return ms, b"".join(chunk for _, chunk in arrived)


def generated(url: str, seed: int) -> bytes:
    """The samples of one request with the same parts."""
    body = json.dumps({"text": "\n\n".join(SENTENCES), "seed": seed}).encode()
    request = urllib.request.Request(
        f"{url}/generate", body, headers={"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as answer:
        wav: bytes = answer.read()
    return wav[44:]


def http_first_audio_s(url: str, seed: int) -> float:
    """Time to the first audio of the first sentence as a request of its own."""
    body = json.dumps({"text": SENTENCES[0], "seed": seed, "streaming": True}).encode()
    connection = http.client.HTTPConnection(url.removeprefix("http://"))
    connection.connect()
    begin_s = time.monotonic()
    connection.request("POST", "/generate", body, {"Content-Type": "application/json"})
    connection.getresponse().read(45)  # the header, and a byte of audio
    first_s = time.monotonic() - begin_s
    connection.close()
    return first_s


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url")
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--rate", type=float, default=20.0)
    given = parser.parse_args()
    with contextlib.nullcontext(given.url) if given.url else started() as url:
        runs, equal = [], []
        for seed in range(given.runs):
            figures, samples = asyncio.run(run(url, seed, given.rate))
            figures["http_first_audio"] = round(http_first_audio_s(url, seed) * 1000, 1)
            equal.append(samples == generated(url, seed))
            runs.append(figures)
            print(f"seed {seed}: {figures}, equal samples: {equal[-1]}", flush=True)
    summary = {
        name: {
            "median": statistics.median(figures[name] for figures in runs),
            "most": max(figures[name] for figures in runs),
        }
        for name in runs[0]
    }
    result = {
        "rate": given.rate,
        "runs": len(runs),
        "ms": summary,
        "equal_samples": all(equal),
        "load": os.getloadavg()[0],
        "processors": os.cpu_count(),
    }
    print(json.dumps(result))
    return 0 if all(equal) else 1


if __name__ == "__main__":
    sys.exit(main())
