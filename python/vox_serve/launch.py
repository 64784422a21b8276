"""Serve speech over HTTP.

python -m vox_serve.launch --model sesame/csm-1b --port 8000
"""

import asyncio
import contextlib
import errno
import gc
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

from vox_serve.cli import CommandError, CommandParser, run_command
from vox_serve.config import (
    ENV_PREFIX,
    Config,
    ModelSettings,
    OutputSettings,
    ServerSettings,
    SpeechSettings,
)
from vox_serve.console import standard_streams
from vox_serve.log_lines import json_line
from vox_serve.logs import server_log
from vox_serve.speech import make_engine

if TYPE_CHECKING:
    import uvicorn
    from fastapi import FastAPI
    from starlette.types import ASGIApp

    from vox_serve.long_form import LongForm
    from vox_serve.runner import Runner

PROG = "vox-serve"

_NOT_OUR_ADDRESS = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)

NUM_SPARE_ROWS = 1
"""Places beyond --max_batch_size for clients that speak nothing yet."""

SHUTDOWN_GRACE_S = 5.0
"""Time that a stopping server gives its clients to read their responses."""

EXIT_INTERRUPTED = 130
"""Exit code after a second signal."""


class Served(Protocol):
    """The speaker behind a server's application.

    Attributes:
        is_warm: set when requests can be served.
        on_failure: called, from any thread, when none can be served any more.
    """

    is_warm: threading.Event
    on_failure: Callable[[], None]

    async def drain(self, within_s: float) -> None:
        """Refuse what is not begun, and wait for the rest until the time is over."""

    def request_stop(self) -> None:
        """Cut what is still being spoken."""


def make_parser() -> CommandParser:
    """The command's flags."""
    parser = CommandParser(
        PROG,
        description="Serve text-to-speech over HTTP: POST /generate, GET /health, GET /docs.",
        usage="vox-serve launch [--model MODEL] [--port PORT] [flags]",
        epilog="Flags are accepted with dashes too (--top-k). Each has an environment variable, "
        f"{ENV_PREFIX} and its name in capitals ({ENV_PREFIX}TOP_K), which the flag overrides.",
    )
    parser.add_settings(ModelSettings, SpeechSettings, OutputSettings, ServerSettings)
    return parser


@standard_streams()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = make_parser()
    _, config = parser.parse(argv)
    return run_command(PROG, lambda: serve(config))


def serve(config: Config) -> int:
    """Load the model and serve until interrupted; return the exit code.

    Raises:
        CommandError: the address is invalid or in use.
    """
    from vox_serve.access import AccessPolicy

    AccessPolicy.of(config)  # a wrong setting is reported before the model is loaded
    if config.watermark:
        from vox_serve.watermark_net import check_installed

        check_installed()

    # Bind before loading the model: a port in use is reported at once, and nobody takes it
    # meanwhile.
    listeners = reserve_addresses(config.host, config.port)

    announce(config, f"Loading {config.model} ...")
    runner, app = load_app(config)
    server = make_server(app, runner, config, listeners[0])
    with server_log(config.log_level, config.log_format):
        server.run(sockets=listeners)
    exit_code = runner.exit_code if server.started else 1
    if runner.is_busy:  # a thread in native code would crash the interpreter's own end
        end_now(exit_code)
    return exit_code


def load_app(config: Config) -> "tuple[Runner, FastAPI]":
    """Load the model; return its runner, not started yet, and the application.

    Raises:
        ConfigError, ValueError, OSError: see `make_engine` and `create_app`.
    """
    from vox_serve.api import create_app
    from vox_serve.policy import choose_step
    from vox_serve.runner import Runner

    engine = make_engine(
        config, NUM_SPARE_ROWS, choose_step if config.policy == "deadline" else None
    )
    runner = Runner.for_config(engine, config)
    if config.warm_up_s != 0:
        runner.warm_up = partial(engine.warm_up, config.warm_up_s)
    app = create_app(runner, config, describe(engine, config))
    # A full garbage collection takes 0.2 s, in which no other thread runs, to look at what was
    # loaded and stays. Any body with many lists causes one.
    gc.collect()
    gc.freeze()
    return runner, app


def announce(config: Config, text: str, brief: str | None = None) -> None:
    """Tell whoever started the server something: a text, or in a JSON log one line.

    Args:
        config: tells the log's format.
        text: several lines at most.
        brief: the JSON line's message, if it is not `text`.
    """
    if config.log_format == "json":
        text = json_line("info", "vox_serve", brief or text)
    print(text, flush=True)


def end_now(exit_code: int) -> NoReturn:
    """End the process without waiting for any thread."""
    with contextlib.suppress(Exception):  # a signal handler may interrupt a write
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(exit_code)


def describe(engine: "LongForm", config: Config) -> dict[str, str | int]:
    """The engine's part of the answer to /health."""
    from voxkern.backend import backend_for

    device = engine.model.device
    return {
        "model": config.model,
        **({"adapter": config.adapter} if config.adapter else {}),
        "device": str(device),
        "dtype": str(engine.model.dtype).removeprefix("torch."),
        "quantize": config.quantize,
        "backend": backend_for(device.type),
        "max_batch_size": engine.max_batch_size,
    }


def reserve_addresses(host: str, port: int) -> list[socket.socket]:
    """Bind a socket to each of the host's addresses that this machine has, without listening yet.

    `localhost` often has one address of IPv4 and one of IPv6, and clients try either first.

    Raises:
        CommandError: see `reserve_address`.
    """
    listeners: list[socket.socket] = []
    addresses = _resolve(host)
    for address in addresses if host else addresses[:1]:  # without a host, one stands for all
        try:
            listeners.append(reserve_address(address, port))
        except CommandError as error:
            not_here = getattr(error.__cause__, "errno", None) in _NOT_OUR_ADDRESS
            if not_here and (listeners or address != addresses[-1]):
                continue
            for listener in listeners:
                listener.close()
            raise
        port = listeners[0].getsockname()[1]  # the same free port for all
    return listeners


def reserve_address(host: str, port: int) -> socket.socket:
    """Bind a socket to the host's first address, without listening yet.

    Raises:
        CommandError: the address is in use, not of this machine, or invalid.
    """
    address = _resolve(host)[0]
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = None
    try:
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, port))
    except OSError as error:
        if listener:
            listener.close()
        raise CommandError(f"cannot listen on {host} port {port}: {error.strerror}") from error
    return listener


def _resolve(host: str) -> list[str]:
    """The host's addresses, each once."""
    try:
        found = socket.getaddrinfo(
            host or None, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CommandError(f"--host {host}: {reason}") from None
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


def make_server(
    app: "ASGIApp",
    runner: Served,
    config: Config,
    listener: socket.socket | None,
    wrap: "Callable[[type[asyncio.Protocol]], Any]" = lambda protocol: protocol,
    **options: Any,
) -> "uvicorn.Server":
    """A server of `app` that prints when it is ready.

    On a signal it begins no request any more, but answers, finishes what is being spoken within
    `drain_s`, then cuts the rest. A second signal ends the process at once.

    Args:
        app: the application.
        runner: speaks.
        config: the settings.
        listener: its address is printed; None to print nothing.
        wrap: makes the factory of connections from the class of their protocol.
        options: further ones of `uvicorn.Config`.
    """
    import anyio
    import uvicorn

    from vox_serve.connections import ACCEPT_BATCH, BACKLOG, ConnectionGuard
    from vox_serve.live_protocol import PING_S, live_protocol

    class Server(uvicorn.Server):
        signalled = False

        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            # Uvicorn raises the signals again afterwards; here they end with the exit code 0.
            if threading.current_thread() is not threading.main_thread():
                yield
                return
            signals = (signal.SIGINT, signal.SIGTERM)
            previous = {sig: signal.signal(sig, self.handle_exit) for sig in signals}
            try:
                yield
            finally:
                for sig, handler in previous.items():
                    signal.signal(sig, handler)

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            if self.signalled:
                end_now(EXIT_INTERRUPTED)
            self.signalled = self.should_exit = True

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            for waiting in sockets or []:
                waiting.listen(BACKLOG)  # asyncio uses one number for this and for ACCEPT_BATCH
            if not self.should_exit:
                async with anyio.create_task_group():  # the first streamed answer would import it
                    pass
                await asyncio.to_thread(runner.is_warm.wait)
            if listener is not None and not self.should_exit:
                url = url_of(listener)
                announce(config, _greeting(url), f"ready at {url}")

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            # The listener stays open meanwhile: probes see that the server lives but is not ready.
            await runner.drain(config.drain_s)
            # Uvicorn waits for open responses before it stops the app: end them first.
            runner.request_stop()
            guard.stop_pacing()
            # Then hang up on clients that neither send nor read. Uvicorn's own
            # timeout_graceful_shutdown would cancel their tasks, and log a traceback for each.
            timer = asyncio.get_running_loop().call_later(SHUTDOWN_GRACE_S, self.hang_up)
            await super().shutdown(sockets)
            timer.cancel()

        def hang_up(self) -> None:
            for connection in list(self.server_state.connections):
                connection.transport.abort()

    guard = ConnectionGuard(config, getattr(app, "statuses", None))
    server = Server(
        uvicorn.Config(
            app,
            http=wrap(guard.protocol_class()),
            loop="asyncio",  # not uvloop, if that is installed: the guard knows this one's sockets
            backlog=ACCEPT_BATCH,
            log_level=config.log_level,
            ws=live_protocol,  # type: ignore[arg-type]
            ws_max_size=config.max_body_bytes,
            ws_ping_interval=PING_S,
            ws_ping_timeout=PING_S,
            ws_per_message_deflate=False,  # audio does not shrink, and small bombs grow
            **options,
        )
    )

    def end_server() -> None:
        server.should_exit = True

    runner.on_failure = end_server
    return server


def url_of(listener: socket.socket) -> str:
    """The URL at which a client on this machine reaches the socket."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _greeting(url: str) -> str:
    return (
        f"\nVoxKern is ready at {url} (ctrl-C ends it). Try:\n\n"
        f"  curl {url}/generate -H 'Content-Type: application/json'"
        """ -d '{"text": "Hello from VoxKern."}' -o hello.wav\n\n"""
        f"or open {url}/ in a browser.\n"
    )


if __name__ == "__main__":
    sys.exit(main())
