"""Whole frames of several programs, each loaded in its own process, timed in turn.

A frame is one backbone token after 128 cached ones, then 31 steps of the depth decoder from an
empty cache. Programs: ours; transformers, plain and with torch.compile; llama.cpp in its nearest
formats (BF16, Q8_0, Q4_0). Their environment, build/peers/venv, is made on the first call:
llama.cpp is compiled for this machine, which may take half an hour. A program that cannot be
installed, lacks memory or does not answer is reported and left out.

In a round every program makes a few frames while the others wait, in an order that changes from
round to round; each round starts with a measurement of the read bandwidth. A program's figure is
the median of its rounds, with minimum and maximum; ratios and shares of the roofline are computed
within a round, and the median over rounds is reported.
"""

import json
import os
import select
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import roofline
from csm_1b_shapes import FRAME_MS
from machine import cache_bytes, memory_bytes
from report import Report

import voxkern
from vox_serve.frame_bytes import FrameBytes

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "build" / "peers"
PYTHON = FOLDER / "venv" / "bin" / "python"
WHEELS = ("torch>=2.11,<2.14", "transformers>=5.18,<6", "gguf==0.19.*", "matplotlib")
LLAMA_CPP = ("llama-cpp-python==0.3.36",)
# -march=native, without image support.
LLAMA_CPP_BUILD = {"CMAKE_ARGS": "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF"}
SETTINGS = {
    "voxkern": {"OMP_WAIT_POLICY": "PASSIVE"},  # as `say` and `launch` do
    # Weights as packed constants: torch's advice for inference on a CPU, 1.3 x here.
    "torch.compile": {"TORCHINDUCTOR_FREEZING": "1"},
}
LOAD_S = 300
"""Limit for loading and warm-up; a program that exceeds it, such as torch.compile, is left out."""
TURN_S = 300
SETTLE_S = 0.05
"""Time for OpenMP's threads to go idle: after a parallel op they spin on their cores for some
milliseconds."""


@dataclass(frozen=True)
class Peer:
    program: str
    precision: str

    def __str__(self) -> str:
        return f"{self.program} {self.precision}"

    @property
    def memory_bytes(self) -> float:
        """Estimated memory of its process: 1.3 G weights plus half a gigabyte."""
        per_weight = {"float32": 4, "bfloat16": 2, "int8": 1.1, "int4": 0.65}
        copies = 2 if self.program == "torch.compile" else 1  # packed for oneDNN, and plain
        return 0.5e9 + 1.3e9 * per_weight[self.precision] * copies


BASELINE = Peer("transformers", "bfloat16")
# The peers of a group are in memory together and are compared.
GROUPS = (
    (Peer("voxkern", "float32"), Peer("transformers", "float32")),
    (
        Peer("voxkern", "bfloat16"),
        Peer("llama.cpp", "bfloat16"),
        Peer("voxkern", "int8"),
        Peer("llama.cpp", "int8"),
        Peer("voxkern", "int4"),
        Peer("llama.cpp", "int4"),
        BASELINE,
        Peer("torch.compile", "bfloat16"),
    ),
)


def order(peers: list, round_index: int) -> list:
    """Order of a round: in 2 n rounds, each of n peers is in each position twice, once after
    either of its neighbours."""
    first = round_index // 2 % len(peers)
    rotated = [*peers[first:], *peers[:first]]
    return rotated if round_index % 2 == 0 else rotated[::-1]


def environment(program: str = "") -> Path:
    """The Python that runs a program; creates or completes the peers' environment if necessary.

    Raises:
        RuntimeError: something cannot be installed; the message names it and its log.
    """
    if program == "voxkern":
        return Path(sys.executable)
    problem = _install("wheels", WHEELS)
    if program == "llama.cpp":
        problem = problem or _install("llama.cpp", LLAMA_CPP)
    if problem:
        raise RuntimeError(problem)
    return PYTHON


@cache
def _install(name: str, packages: tuple[str, ...]) -> str | None:
    """Installs packages that are missing, once per run; returns the problem, or None."""
    mark, log = FOLDER / "venv" / f"installed-{name}", FOLDER / f"install-{name}.log"
    if mark.exists() and mark.read_text() == "\n".join(packages):
        return None
    print(f"installing {name} for the peers: takes minutes", file=sys.stderr)
    pip = [PYTHON, "-m", "pip", "install", "--no-binary", "llama-cpp-python", *packages]
    with log.open("w") as output:
        for command in ([sys.executable, "-m", "venv", FOLDER / "venv"], pip):
            done = subprocess.run(
                command, stdout=output, stderr=output, env=LLAMA_CPP_BUILD | dict(os.environ)
            )
            if done.returncode:
                return f"not installed, see {log.relative_to(ROOT)}"
    mark.write_text("\n".join(packages))
    return None


class Worker:
    """A peer's process, loaded and warm.

    Raises:
        RuntimeError: it ended, or did not answer in time; the message names its log.
    """

    def __init__(self, peer: Peer, python: Path, threads: int):
        self.log = FOLDER / f"{peer}.log".replace(" ", "-")
        paths = {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "python")))}
        script = Path(__file__).with_name("peer_worker.py")
        arguments = [peer.program, peer.precision, FOLDER, str(threads)]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [python, script, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=dict(os.environ) | paths | SETTINGS.get(peer.program, {}),
            )
        try:
            ready = self._answer(LOAD_S)
        except RuntimeError:
            self.close()
            raise
        self.bytes = FrameBytes(*ready["bytes"])
        self.description = ready["description"]

    def frames_ms(self, frames: int) -> list[float]:
        print(frames, file=self.process.stdin, flush=True)
        return self._answer(TURN_S)["ms"]

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()

    def _answer(self, seconds: float) -> dict:
        # Requests are answered one by one with a single line, so readable output is a whole line.
        readable, _, _ = select.select([self.process.stdout], [], [], seconds)
        line = self.process.stdout.readline() if readable else None
        if not line:
            reason = f"no answer in {seconds} s" if line is None else "it ended"
            raise RuntimeError(f"{reason}, see {self.log.relative_to(ROOT)}")
        return json.loads(line)


@dataclass
class Rounds:
    """Measurements of one peer: a value per round."""

    bytes: FrameBytes
    description: str
    ms: list[float] = field(default_factory=list)
    bandwidth: list[float] = field(default_factory=list)

    def floor_ms(self, num_bytes: int) -> float | None:
        """The time to read that many bytes; None if the bandwidth is unknown."""
        if not self.bandwidth:
            return None
        return statistics.median(1e3 * num_bytes / rate for rate in self.bandwidth)

    def percent_of_roofline(self, num_bytes: int) -> float | None:
        if not self.bandwidth:
            return None
        pairs = zip(self.ms, self.bandwidth, strict=True)
        return statistics.median(1e5 * num_bytes / (ms * rate) for ms, rate in pairs)


@cache
def has_probe() -> bool:
    """True if the read bandwidth can be measured; without it, roofline columns stay empty."""
    try:
        roofline.read_bandwidth()
    except RuntimeError as error:
        print(f"roofline: left out, {error}", flush=True)
        return False
    return True


def measure(peers: list[Peer], rounds: int, frames: int, threads: int) -> dict[Peer, Rounds]:
    """Milliseconds per frame, round by round. A peer that fails is reported and left out."""
    measured: dict[Peer, Rounds] = {}
    with ExitStack() as stack:
        workers: dict[Peer, Worker] = {}
        for peer in peers:
            available = memory_bytes("MemAvailable")
            if available is not None and available < peer.memory_bytes:
                short = (peer.memory_bytes - available) / 1e9
                print(f"{peer}: left out, {short:.1f} GB of memory short", flush=True)
                continue
            try:
                python = environment(peer.program)
                workers[peer] = stack.enter_context(Worker(peer, python, threads))
            except RuntimeError as error:
                print(f"{peer}: left out, {error}", flush=True)
                continue
            measured[peer] = Rounds(workers[peer].bytes, workers[peer].description)
        for index in range(rounds if measured else 0):
            bandwidth = []
            if has_probe():
                bandwidth = [statistics.median(roofline.read_bandwidth() for _ in range(5))]
            for peer in order([*measured], index):
                time.sleep(SETTLE_S)
                try:
                    ms = statistics.median(workers[peer].frames_ms(frames))
                except RuntimeError as error:
                    print(f"{peer}: left out, {error}", flush=True)
                    del measured[peer]
                    continue
                measured[peer].ms.append(ms)
                measured[peer].bandwidth += bandwidth
    return measured


def ratio(peer: Rounds | None, base: Rounds | None) -> tuple[float, float, float] | None:
    """Time of a frame of `peer` over one of `base`: median, minimum, maximum over rounds."""
    if peer is None or base is None:
        return None
    ratios = [a / b for a, b in zip(peer.ms, base.ms, strict=True)]
    return statistics.median(ratios), min(ratios), max(ratios)


def run(report: Report, rounds: int, frames: int, only: list[str] | None) -> None:
    table = report.table(
        "peers",
        [
            *("program", "precision", "ms", "ms least", "ms most", "GB read"),
            *("floor ms", "% roofline", "past L3 ms", "% past L3", "real-time factor"),
            *("x voxkern", "x least", "x most", "baseline x"),
        ],
    )
    programs = report.machine["programs"] = {}
    FOLDER.mkdir(parents=True, exist_ok=True)
    for group in GROUPS:
        peers = [peer for peer in group if not only or str(peer) in only]
        measured = measure(peers, rounds, frames, voxkern.num_threads())
        for peer, seen in measured.items():
            ms, read = statistics.median(seen.ms), seen.bytes
            past_l3 = read.from_memory(cache_bytes(3))
            versus_ours = ratio(seen, measured.get(Peer("voxkern", peer.precision)))
            versus_baseline = ratio(measured.get(BASELINE), seen)
            table.add(
                *(peer.program, peer.precision, ms, min(seen.ms), max(seen.ms), read.total / 1e9),
                *(seen.floor_ms(read.total), seen.percent_of_roofline(read.total)),
                *(seen.floor_ms(past_l3), seen.percent_of_roofline(past_l3)),
                ms / FRAME_MS,
                *(versus_ours or (None, None, None)),
                versus_baseline and versus_baseline[0],
            )
            programs[str(peer)] = seen.description


def plot(results: Path) -> Path:
    """Draws the results as a PNG file next to them.

    Raises:
        RuntimeError: the plotting library cannot be installed.
    """
    picture = results.with_suffix(".png")
    script = Path(__file__).with_name("plot_peers.py")
    subprocess.run([environment(), script, results, picture], check=True)
    return picture
