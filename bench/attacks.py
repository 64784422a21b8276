"""Time to first audio of a normal client while other clients attack the server.

    python bench/attacks.py [--save FOLDER] [--only NAME,NAME] [--requests 12]

The built-in voice on a server of its own for each attack. The normal client sends short streamed
requests, one after the other, from an address of its own (127.0.0.2): first alone, then while the
attack runs, then alone again. `times quiet` is the median during the attack over the median of both
quiet phases; below 2 is the aim. A refused or broken answer of the normal client counts as failed.

Prints a table and writes attacks.json.
"""

import argparse
import asyncio
import json
import random
import resource
import statistics
import sys
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path

import http_clients as clients
import machine
from http_clients import Address
from soak import Server

ROOT = Path(__file__).parents[1]
TEXT = "Hello there."
LONG_TEXT = "The quick brown fox jumps over the lazy dog, and then it sleeps. " * 4
SERVER_FLAGS = ["--max_batch_size", "4", "--max_queue_size", "16", "--log_level", "error"]
NORMAL_ADDRESS = "127.0.0.2"
PAUSE_S = 0.1

Attack = Callable[[Address], Awaitable[object]]


async def long_text(address: Address) -> None:
    """A text of 200,000 digits, whose client leaves at once; then the longest that may be said."""
    for num_chars in (200_000, 8_000):
        _, writer = await clients.connect(address)
        writer.write(clients.request_bytes(address, text="1" * num_chars))
        await asyncio.sleep(0.2)
        clients.reset(writer)


async def never_read(address: Address) -> None:
    """Streamed answers that nobody reads."""
    await clients.stall(address, 5, text=LONG_TEXT, streaming=True)


async def be_silent(address: Address) -> None:
    """Connections that send nothing."""
    await clients.stay_silent(address, 60)


async def slow_headers(address: Address) -> None:
    """Headers that arrive byte by byte."""
    await clients.send_slowly(address, b"POST /generate HTTP/1.1\r\nX-A: b\r\n", 60)


async def slow_body(address: Address) -> None:
    """A body that arrives byte by byte."""
    data = b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9999\r\n\r\n"
    await clients.send_slowly(address, data + b"{" + b" " * 9000, 60)


async def flood(address: Address) -> None:
    """Ten times as many long requests as the server can speak at once."""
    await clients.generate(address, text=LONG_TEXT)


async def leave(address: Address) -> None:
    """Clients that are killed in the middle of a stream."""
    await clients.cancel(address, random.randrange(1, 20_000), text=LONG_TEXT, streaming=True)


async def large_body(address: Address) -> None:
    """Bodies of 20 MB."""
    _, writer = await clients.connect(address)
    writer.write(b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: 20000000\r\n\r\n")
    for _ in range(20):
        writer.write(bytes(1_000_000))
        await writer.drain()
    clients.reset(writer)


async def malformed(address: Address) -> None:
    """Requests that are no HTTP, and bodies that are no JSON."""
    await clients.send_raw(address, b"\x16\x03\x01 no http\r\n\r\n")
    head = b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4000\r\n\r\n"
    await clients.send_raw(address, head + b"[" * 4000)


async def nothing(address: Address) -> None:
    """Steps of the engine and of the codec that fail, about one in two seconds."""
    await asyncio.sleep(1)


ATTACKS: dict[str, tuple[Attack, int, float]] = {
    "long text": (long_text, 4, 0),
    "never read": (never_read, 8, 0),
    "silent connections": (be_silent, 1100, 0),
    "slow headers": (slow_headers, 100, 0),
    "slow body": (slow_body, 100, 0),
    "overload": (flood, 40, 0),
    "killed clients": (leave, 8, 0),
    "large body": (large_body, 2, 0),
    "malformed": (malformed, 4, 0),
    "failing steps": (nothing, 1, 2),
}
"""Each attack: one client's part, how many at once, and the mean seconds between faults."""


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


async def during(attack: Attack, at_once: int, address: Address, requests: int) -> tuple:
    """`measure` while so many attackers are at work."""

    async def attacker() -> None:
        while True:
            try:
                await attack(address)
            except OSError:
                await asyncio.sleep(0.1)

    tasks = [asyncio.create_task(attacker()) for _ in range(at_once)]
    await asyncio.sleep(2)
    try:
        return await measure(address, requests)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def run(name: str, requests: int) -> dict:
    """One attack; its row."""
    attack, at_once, fault_every_s = ATTACKS[name]
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder), fault_every_s, SERVER_FLAGS)
        try:
            await measure(server.address, 3)
            before, _ = await measure(server.address, requests)
            under, failed = await during(attack, at_once, server.address, requests)
            await asyncio.sleep(3)
            after, _ = await measure(server.address, requests)
        finally:
            server.stop()
        log_bytes = server.log.stat().st_size
    quiet = statistics.median(before + after)
    attacked = statistics.median(under) if under else None
    return {
        "attack": name,
        "at once": at_once,
        "quiet ms": round(quiet, 1),
        "attacked ms": attacked and round(attacked, 1),
        "times quiet": attacked and round(attacked / quiet, 2),
        "worst ms": round(max(under), 1) if under else None,
        "failed": failed,
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
    # This process has a descriptor per attacker; the server has a limit of its own.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    rows = []
    for name in args.only.split(","):
        rows.append(asyncio.run(run(name, args.requests)))
        print(json.dumps(rows[-1]), flush=True)
    args.save.mkdir(parents=True, exist_ok=True)
    results = {"machine": machine.describe(), "attacks": rows}
    (args.save / "attacks.json").write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
