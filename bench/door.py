"""Processor time that a cluster's door takes for a piece of audio.

    python bench/door.py [--streams 50] [--seconds 10]

The door of `vox_serve.cluster` in this process, without Ray, between a child's replica and a
child's clients. The replica sends a piece of 80 ms of each stream every 80 ms. Processor time of
this process alone counts, so that it matters little how busy the machine is. The last line is JSON.
"""

import argparse
import asyncio
import subprocess
import sys
import threading
import time

from report import Report

from vox_serve.cluster.door import Door, Offer, Want
from vox_serve.cluster.private_server import Address
from vox_serve.config import Config
from vox_serve.launch import make_server, reserve_address

FRAME_S = 0.08
PIECE = b"%x\r\n%s\r\n" % (3840, bytes(3840))
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: audio/wav\r\ntransfer-encoding: chunked\r\n\r\n"


class OneReplica:
    """A `Fleet` of the child's replica."""

    def __init__(self, port: int):
        self.address = Address("127.0.0.1", port, "secret")

    async def offer(self, _: Want) -> Offer:
        return Offer("child", self.address, 1)

    def addresses(self) -> dict[str, Address]:
        return {"child": self.address}

    def slack(self, _: object) -> float:
        return 0.0


async def answer(seconds: float, reader, writer) -> None:
    """Send a stream as a replica does."""
    await reader.readuntil(b"\r\n\r\n")
    writer.write(HEAD)
    due_s = time.monotonic()
    for _ in range(round(seconds / FRAME_S)):
        writer.write(PIECE)
        await writer.drain()
        due_s += FRAME_S
        await asyncio.sleep(due_s - time.monotonic())
    writer.write(b"0\r\n\r\n")
    await writer.drain()
    writer.close()


async def read(port: int) -> int:
    """Read a stream; return its bytes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}")
    size = 0
    while not (data := await reader.read(65_536)).endswith(b"0\r\n\r\n"):
        size += len(data)
    writer.close()
    return size + len(data)


async def child(streams: int, seconds: float) -> None:
    """Be the replica and the clients."""

    async def serve(reader, writer) -> None:
        await answer(seconds, reader, writer)

    replica = await asyncio.start_server(serve, "127.0.0.1", 0)
    print(replica.sockets[0].getsockname()[1], flush=True)
    port = int(await asyncio.to_thread(sys.stdin.readline))
    print(sum(await asyncio.gather(*(read(port) for _ in range(streams)))), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--streams", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        asyncio.run(child(args.streams, args.seconds))
        return
    options = ["--streams", str(args.streams), "--seconds", str(args.seconds)]
    command = [sys.executable, __file__, "--child", *options]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as load:
        config = Config(log_level="warning")
        door = Door(OneReplica(int(load.stdout.readline())), config)
        listener = reserve_address("127.0.0.1", 0)
        server = make_server(door.app, door, config, listener, lifespan="off")
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        before = time.process_time()
        print(listener.getsockname()[1], file=load.stdin, flush=True)
        num_bytes = int(load.stdout.readline())
        used_s = time.process_time() - before
        server.should_exit = True
        thread.join()
    pieces = args.streams * round(args.seconds / FRAME_S)
    assert num_bytes >= pieces * 3840, num_bytes
    each_us = 1e6 * used_s / pieces
    report = Report()
    table = report.table("door", ["streams", "pieces", "us a piece", "streams of a processor"])
    table.add(args.streams, pieces, each_us, 1e6 * FRAME_S / each_us)
    print(report.json())


if __name__ == "__main__":
    main()
