"""A `python` for tests that has imported torch and fastapi, which takes 3 s of processor time.

Each process that runs tests has one process that imports these and nothing else. It forks for each
command; if an import started threads, the fork starts a `python` from scratch. `python()`
returns a small client: it hands over its arguments, environment, folder and standard streams, and
ends as the fork does. Variables that are read when Python starts or torch is imported have no
effect, apart from PYTHONPATH; nor have the client's limits (`ulimit`), niceness and process group.
"""

import contextlib
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile

ENDS_AFTER_S = 300
"""A fork ends then by SIGALRM (exit code -14): it may hang, and its client may have been killed."""


@functools.cache
def python() -> list[str]:
    """The beginning of a command; `-c CODE`, `-m MODULE` or FILE and their arguments follow."""
    folder = tempfile.TemporaryDirectory()
    python.folder = folder  # until this process ends
    address = os.path.join(folder.name, "socket")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        one_thread = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        inherited = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        python.server = subprocess.Popen(
            [sys.executable, __file__, "--serve", str(listener.fileno())],
            stdin=subprocess.PIPE,  # its end is the end of the server
            pass_fds=[listener.fileno()],
            env=inherited | one_thread,
        )
    return [sys.executable, "-SE", __file__, address]


def request(address: str, arguments: list[str]) -> int:
    """Run a command in a fork; returns its exit code, negative for a signal."""
    streams = [fd for fd in range(3) if is_open(fd)]
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(address)
        socket.send_fds(connection, [b"\n"], streams)
        command = streams, arguments, os.getcwd(), dict(os.environ)
        connection.sendall(f"{json.dumps(command)}\n".encode())
        with connection.makefile() as answer:
            child = int(answer.readline())
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, lambda number, _: send(child, number))
            return int(answer.readline())


def send(process: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has ended
        os.kill(process, number)


def is_open(fd: int) -> bool:
    with contextlib.suppress(OSError):
        return bool(os.fstat(fd))
    return False


def serve(listener: socket.socket) -> list[str]:
    """Fork for each connection. Returns the command's arguments, in the fork."""
    import select

    import fastapi  # noqa: F401
    import pydantic_settings  # noqa: F401
    import torch  # noqa: F401

    has_threads = len(os.listdir("/proc/self/task")) > 1  # not with the torch that was tried
    while listener in select.select([listener, sys.stdin], [], [])[0]:
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            arguments = fork(connection)
            if has_threads:  # a fork of a process with threads may only start another program
                os.execv(sys.executable, [sys.executable, *arguments])
            return arguments
        connection.close()
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
    sys.exit()


def fork(connection: socket.socket) -> list[str]:
    """Receive a command and report its fork's number and exit code. Returns in the fork only."""
    _, descriptors, *_ = socket.recv_fds(connection, 1, 3)
    with connection.makefile() as lines:
        streams, arguments, folder, environment = json.loads(lines.readline())
    if child := os.fork():
        for fd in (0, 1, 2, *descriptors):
            os.close(fd)
        connection.sendall(b"%d\n" % child)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        connection.sendall(b"%d\n" % code)
        os._exit(0)
    connection.close()
    signal.alarm(ENDS_AFTER_S)
    for fd in range(3):
        os.close(fd)
    for fd, descriptor in zip(streams, descriptors, strict=True):
        os.dup2(descriptor, fd)
        os.close(descriptor)
    for fd, name in enumerate(("stdin", "stdout", "stderr")):
        how = {"buffering": 1, "errors": "backslashreplace"} if fd == 2 else {}
        stream = open(fd, "w" if fd else "r", closefd=False, **how) if fd in streams else None  # noqa: SIM115
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    return arguments


def execute(arguments: list[str]) -> None:
    """Do what `python *arguments` does."""
    import runpy

    paths = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    option, value = arguments[0], arguments[1] if len(arguments) > 1 else ""
    if option == "-c":
        sys.path[:1] = ["", *paths]
        sys.argv = ["-c", *arguments[2:]]
        exec(value, {"__name__": "__main__"})
    elif option == "-m":
        sys.path[:1] = [os.getcwd(), *paths]
        sys.argv = arguments[1:]
        runpy.run_module(value, run_name="__main__", alter_sys=True)
    else:
        sys.path[:1] = [os.path.dirname(option), *paths]
        sys.argv = arguments
        runpy.run_path(option, run_name="__main__")


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        execute(serve(socket.socket(fileno=int(sys.argv[2]))))
    else:
        exit_code = request(sys.argv[1], sys.argv[2:])
        if exit_code < 0:
            with contextlib.suppress(OSError):  # SIGKILL has no handler
                signal.signal(-exit_code, signal.SIG_DFL)
            os.kill(os.getpid(), -exit_code)
        os._exit(exit_code)
