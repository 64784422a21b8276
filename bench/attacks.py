"""Time to first audio of a normal client while other clients attack the server.

    python bench/attacks.py [--save FOLDER] [--only NAME,NAME] [--requests 12]

The built-in voice on a server of its own for each attack. The normal client sends short streamed
requests, one after the other, in these phases, with a quiet one before and after each:

- `attacked`: the attackers have another address than the normal client, as on the internet.
- `same address`: they share its address, so that the server takes them for one client.
- `decoy`: the attackers attack another server, which refuses all requests at once. This shows what
  the attackers cost as programs on the same processors.

Each `times quiet` is the median of first audio in a phase over the median of the quiet phases;
below 2 is the aim. A refused or broken answer of the normal client counts as failed. The attackers
and the decoy are processes with niceness 19: on the internet they have processors of their own.

Prints a table and writes attacks.json.
"""

import argparse
import asyncio
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import http_clients as clients
import machine
from attackers import ATTACKS, DECOY
from http_clients import Address
from soak import Server

ROOT = Path(__file__).parents[1]
TEXT = "Hello there."
SERVER_FLAGS = ["--max_batch_size", "4", "--max_queue_size", "16", "--log_level", "error"]
NORMAL_ADDRESS = "127.0.0.2"
ATTACKERS_ADDRESS = "127.0.0.1"
NICENESS = 19
PAUSE_S = 0.1
WARM_UP_S = 2.0
SETTLE_S = 3.0
FAULT_EVERY_S = {"failing steps": 2.0}
"""Mean seconds between faults of the engine and the codec, by attack."""


async def measure(address: Address, requests: int) -> tuple[list[float], int]:
    """Times to first audio in ms of the normal client's requests, and how many failed."""
    normal = Address(address.port, own=NORMAL_ADDRESS)
    times, failed = [], 0
    for index in range(requests):
        await asyncio.sleep(PAUSE_S)
        try:
            async with asyncio.timeout(60):
                answer = await clients.generate(normal, text=TEXT, seed=index, streaming=True)
        except (OSError, TimeoutError):
            failed += 1
            continue
        if answer.status == 200 and answer.complete and answer.first_audio_s is not None:
            times.append(1e3 * answer.first_audio_s)
        else:
            failed += 1
    return times, failed


@contextlib.contextmanager
def attackers(*args: str) -> Iterator[str]:
    """A process of bench/attackers.py; yields its first line."""
    command = [sys.executable, str(ROOT / "bench" / "attackers.py"), *args]
    command += ["--nice", str(NICENESS)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
    finally:
        process.kill()
        process.wait()


def attacked(name: str, server: Address, requests: int, port: int, own: str) -> dict:
    """A row's numbers of one phase: the attackers attack `port` from the address `own`."""
    with attackers(name, str(port), "--own", own):
        time.sleep(WARM_UP_S)
        times, failed = asyncio.run(measure(server, requests))
    time.sleep(SETTLE_S)
    return {
        "ms": round(statistics.median(times), 1) if times else None,
        "worst ms": round(max(times), 1) if times else None,
        "failed": failed,
    }


def run(name: str, requests: int) -> dict:
    """One attack; its row."""
    with tempfile.TemporaryDirectory() as folder, attackers(DECOY) as decoy_port:
        server = Server(Path(folder), FAULT_EVERY_S.get(name, 0), SERVER_FLAGS)
        port = server.address.port
        phases = {
            "attacked": (port, ATTACKERS_ADDRESS),
            "same address": (port, NORMAL_ADDRESS),
            "decoy": (int(decoy_port), ATTACKERS_ADDRESS),
        }
        results = {}
        try:
            asyncio.run(measure(server.address, 3))
            quiet, _ = asyncio.run(measure(server.address, requests))
            for phase, target in phases.items():
                results[phase] = attacked(name, server.address, requests, *target)
                quiet += asyncio.run(measure(server.address, requests))[0]
        finally:
            server.stop()
        log_bytes = server.log.stat().st_size
    quiet_ms = statistics.median(quiet)
    for result in results.values():
        result["times quiet"] = result["ms"] and round(result["ms"] / quiet_ms, 2)
    return {
        "attack": name,
        "at once": ATTACKS[name][1],
        "quiet ms": round(quiet_ms, 1),
        **results,
        "of": requests,
        "log bytes": log_bytes,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--save", type=Path, default=ROOT / "build" / "attacks")
    parser.add_argument("--only", default=",".join(ATTACKS))
    parser.add_argument("--requests", type=int, default=12, help="of the normal client, per phase")
    args = parser.parse_args()
    if unknown := set(args.only.split(",")) - set(ATTACKS):
        parser.error(f"--only: there is no {', '.join(sorted(unknown))}")
    rows = []
    for name in args.only.split(","):
        rows.append(run(name, args.requests))
        print(json.dumps(rows[-1]), flush=True)
    args.save.mkdir(parents=True, exist_ok=True)
    results = {
        "machine": machine.describe(),
        "niceness of the attackers": NICENESS,
        "attacks": rows,
    }
    (args.save / "attacks.json").write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
