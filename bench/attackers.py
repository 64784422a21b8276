"""The attackers of bench/attacks.py, in a process of their own.

    python bench/attackers.py NAME PORT [--own 127.0.0.1] [--nice 19]

Prints a line when all are at work, and attacks until it is ended. `decoy` as NAME is no attack: a
server on a free port, which it prints, that refuses every request at once.
"""

import argparse
import asyncio
import contextlib
import os
import random
import resource
import sys
from collections.abc import Awaitable, Callable

import http_clients as clients
from http_clients import Address

LONG_TEXT = "The quick brown fox jumps over the lazy dog, and then it sleeps. " * 4

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


async def nothing(_: Address) -> None:
    """No attack: the server itself has faults."""
    await asyncio.sleep(1)


ATTACKS: dict[str, tuple[Attack, int]] = {
    "long text": (long_text, 4),
    "never read": (never_read, 8),
    "silent connections": (be_silent, 1100),
    "slow headers": (slow_headers, 100),
    "slow body": (slow_body, 100),
    "overload": (flood, 40),
    "killed clients": (leave, 8),
    "large body": (large_body, 2),
    "malformed": (malformed, 4),
    "failing steps": (nothing, 1),
}
"""Each attack: one client's part, and how many clients attack at once."""

DECOY = "decoy"


async def attack_forever(name: str, address: Address) -> None:
    """Run all clients of an attack."""
    attack, at_once = ATTACKS[name]

    async def attacker() -> None:
        while True:
            try:
                await attack(address)
            except OSError:
                await asyncio.sleep(0.1)

    print("attacking", flush=True)
    await asyncio.gather(*(attacker() for _ in range(at_once)))


async def serve_decoy() -> None:
    """Refuse every request."""
    answer = b"HTTP/1.1 429 Too Many Requests\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            if await reader.read(65536):
                writer.write(answer)
                await writer.drain()
        writer.close()

    server = await asyncio.start_server(refuse, "127.0.0.1", 0, backlog=2048)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=[*ATTACKS, DECOY])
    parser.add_argument("port", type=int, nargs="?", default=0)
    parser.add_argument("--own", default="127.0.0.1", help="the attackers' address")
    parser.add_argument("--nice", type=int, default=19)
    args = parser.parse_args()
    os.nice(args.nice)
    # This process has a descriptor per attacker; the server has a limit of its own.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    if args.name == DECOY:
        asyncio.run(serve_decoy())
    else:
        asyncio.run(attack_forever(args.name, Address(args.port, own=args.own)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
