"""A long mixed load on a real server: does anything grow, leak, or change a byte?

    python bench/soak.py [--minutes 30] [--save FOLDER] [--clients 6] [--fault_every_s 120]

Clients run at once, each a random one of: a whole answer, a streamed one, one that leaves midway,
one that never reads, one that sends its headers slowly, a malformed body, a text that is too long.
Steps of the engine and of the codec fail from time to time (bench/soak_server.py). Every complete
answer must equal the one that a quiet server gave for its text and seed. At the end the server
becomes idle: no row, page, descriptor or thread may be left over. Memory's slope is that of a line
through the second half of the samples.

Writes soak.json, and soak.png if matplotlib is installed. Exits with 1 if an answer was wrong or
something was left over; memory's slope is for people to judge.
"""

import argparse
import asyncio
import contextlib
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import http_clients as clients
import machine
import numpy as np
from http_clients import Address

ROOT = Path(__file__).parents[1]
TEXTS = [
    "Hello there.",
    "The quick brown fox jumps over the lazy dog.",
    "Rain falls on the roof, and the lamp burns low.",
    "She said that the train would be late, so we walked along the river and talked.",
]
STALL_TIMEOUT_S = 5
SERVER_FLAGS = [
    *("--max_batch_size", "4", "--max_queue_size", "8", "--log_level", "error"),
    *("--stall_timeout_s", str(STALL_TIMEOUT_S)),
]
START_TIMEOUT_S = 120
SETTLE_S = 15
CLIENTS = {
    "whole": 6,
    "streamed": 6,
    "cancelled": 4,
    "stalled": 1,
    "slow headers": 1,
    "malformed": 2,
    "too long": 1,
}
"""The clients' kinds, with the weights of their choice."""
PAUSE_S = 1.0
"""Mean pause between two clients of one slot, so that the load leaves room for other work."""


class Server:
    """A server process on a free port.

    Args:
        folder: for its state and its log.
        fault_every_s: see bench/soak_server.py.
        flags: further flags of `vox_serve.launch`.
    """

    def __init__(self, folder: Path, fault_every_s: float, flags: list[str]):
        self.state = folder / "state.jsonl"
        self.log = folder / "server.log"
        command = [sys.executable, str(ROOT / "bench" / "soak_server.py"), str(self.state)]
        command += [str(fault_every_s), "--port", "0", *flags]
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        self.address = Address(self._port())

    def _port(self) -> int:
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline and self.process.poll() is None:
            for line in self.log.read_text().splitlines():
                if "is ready at http://" in line:
                    return int(line.split("127.0.0.1:")[1].split()[0].rstrip("/"))
            time.sleep(0.1)
        raise RuntimeError(f"the server did not start: {self.log.read_text()[-500:]}")

    def stop(self) -> int:
        """Stop as a supervisor does; the exit code."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()

    def samples(self) -> list[dict]:
        return [json.loads(line) for line in self.state.read_text().splitlines()]


class Load:
    """The clients, and what came of them.

    Args:
        address: of the server.
        expected: text index to the body of a whole answer.
    """

    def __init__(self, address: Address, expected: dict[int, bytes]):
        self.address = address
        self.expected = expected
        self.counts: Counter[str] = Counter()
        self.first_audio_s: list[float] = []
        self._random = random.Random(1)

    async def run(self, num_clients: int, seconds: float) -> None:
        """Keep that many clients busy for so long."""
        end = time.monotonic() + seconds

        async def slot() -> None:
            while time.monotonic() < end:
                kind = self._random.choices(list(CLIENTS), list(CLIENTS.values()))[0]
                try:
                    outcome = await self._one(kind)
                except OSError:
                    outcome = "no connection"
                self.counts[f"{kind}: {outcome}"] += 1
                await asyncio.sleep(self._random.expovariate(1 / PAUSE_S))

        await asyncio.gather(*(slot() for _ in range(num_clients)))

    async def _one(self, kind: str) -> str:
        index = self._random.randrange(len(TEXTS))
        body = {"text": TEXTS[index], "seed": index}
        if kind in ("whole", "streamed"):
            answer = await clients.generate(self.address, **body, streaming=kind == "streamed")
            return self._judge(answer, index)
        if kind == "cancelled":
            after = self._random.randrange(1, 60_000)
            await clients.cancel(self.address, after, **body, streaming=True)
        elif kind == "stalled":
            await clients.stall(self.address, 2 * STALL_TIMEOUT_S, **body, streaming=True)
        elif kind == "slow headers":
            await clients.send_slowly(self.address, b"POST /generate HTTP/1.1\r\nx: y\r\n", 20)
        elif kind == "malformed":
            status = await clients.send_raw(
                self.address,
                b'POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{"text":1',
            )
            return f"status {status}"
        else:
            answer = await clients.generate(self.address, text="1" * 200_000)
            return f"status {answer.status}"
        return "done"

    def _judge(self, answer: clients.Answer, index: int) -> str:
        if answer.status != 200:
            return f"status {answer.status}"
        if answer.first_audio_s is not None:
            self.first_audio_s.append(answer.first_audio_s)
        samples = answer.body[clients.WAV_HEADER_BYTES :]
        expected = self.expected[index][clients.WAV_HEADER_BYTES :]
        if answer.complete:
            return "right" if samples == expected else "WRONG BYTES"
        return "cut" if expected.startswith(samples[:-960]) else "WRONG BYTES"


def slope_per_hour(samples: list[dict], key: str) -> float:
    """The slope of a line through the second half of the samples, per hour."""
    half = samples[len(samples) // 2 :]
    return float(np.polyfit([s["s"] for s in half], [s[key] for s in half], 1)[0] * 3600)


def left_over(first: dict, last: dict) -> dict[str, list]:
    """Things that an idle server has more of at the end than at the start: [start, end]."""
    keys = ("descriptors", "threads", "rows", "live", "waiting")
    found = {key: [first[key], last[key]] for key in keys if last[key] > first[key]}
    if last["free_pages"] < first["free_pages"]:
        found["free_pages"] = [first["free_pages"], last["free_pages"]]
    return found


def plot(samples: list[dict], picture: Path) -> None:
    """Memory, descriptors and pages in use over time."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    minutes = [sample["s"] / 60 for sample in samples]
    pages = max(sample["free_pages"] for sample in samples)
    series = {
        "memory, MiB": [sample["rss_mib"] for sample in samples],
        "descriptors": [sample["descriptors"] for sample in samples],
        "cache pages in use": [pages - sample["free_pages"] for sample in samples],
    }
    figure, axes = plt.subplots(len(series), sharex=True, figsize=(9, 6))
    for axis, (name, values) in zip(axes, series.items(), strict=True):
        axis.plot(minutes, values, linewidth=0.8, color="#0b6e4f")
        axis.set_ylabel(name)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[-1].set_xlabel("minutes")
    figure.suptitle("Soak: mixed load with cancels, stalls and faults")
    figure.tight_layout()
    figure.savefig(picture, dpi=110)


async def soak(args: argparse.Namespace, folder: Path) -> dict:
    """Run the load; the results."""
    server = Server(folder, args.fault_every_s, SERVER_FLAGS)
    try:
        expected = {}
        for index, text in enumerate(TEXTS):
            expected[index] = (await clients.generate(server.address, text=text, seed=index)).body
        await asyncio.sleep(2)
        before = server.samples()[-1]
        load = Load(server.address, expected)
        await load.run(args.clients, 60 * args.minutes)
        await asyncio.sleep(SETTLE_S)
        samples = server.samples()
    finally:
        code = server.stop()
    first_audio_ms = [1e3 * s for s in load.first_audio_s] or [float("nan")]
    return {
        "machine": machine.describe(),
        "minutes": args.minutes,
        "clients": args.clients,
        "outcomes": dict(sorted(load.counts.items())),
        "faults": samples[-1]["faults"],
        "left over": left_over(before, samples[-1]),
        "MiB an hour": round(slope_per_hour(samples, "rss_mib"), 2),
        "descriptors an hour": round(slope_per_hour(samples, "descriptors"), 2),
        "first audio ms, median and p95": [
            round(float(np.percentile(first_audio_ms, q)), 1) for q in (50, 95)
        ],
        "exit code": code,
        "log lines": len(server.log.read_text().splitlines()),
        "samples": samples[:: max(1, len(samples) // 600)],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--clients", type=int, default=6, help="at once")
    parser.add_argument("--fault_every_s", type=float, default=120, help="0 for no faults")
    parser.add_argument("--save", type=Path, default=ROOT / "build" / "soak")
    args = parser.parse_args()
    args.save.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        results = asyncio.run(soak(args, Path(folder)))
        (args.save / "server.log").write_text((Path(folder) / "server.log").read_text())
    (args.save / "soak.json").write_text(json.dumps(results, indent=1) + "\n")
    with contextlib.suppress(ImportError):
        plot(results["samples"], args.save / "soak.png")
    shown = {key: value for key, value in results.items() if key not in ("samples", "machine")}
    print(json.dumps(shown, indent=1))
    wrong = any("WRONG" in outcome for outcome in results["outcomes"])
    return int(wrong or bool(results["left over"]) or results["exit code"] != 0)


if __name__ == "__main__":
    sys.exit(main())
