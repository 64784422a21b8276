"""The server of bench/soak.py: `vox_serve.launch`, with faults and samples of its own state.

    python bench/soak_server.py STATE.jsonl FAULT_EVERY_S [flags of vox_serve.launch]

Writes one line of JSON a second to STATE.jsonl. About every FAULT_EVERY_S seconds (0: never), a
step of the engine or of the codec raises an exception.
"""

import asyncio
import json
import os
import random
import resource
import sys
import threading
import time
from pathlib import Path
from typing import Any

from vox_serve import launch
from vox_serve.engine import Engine
from vox_serve.long_form import LongForm
from vox_serve.mimi import Mimi

SAMPLE_S = 1.0
MAX_DESCRIPTORS = 1024
"""The usual limit of a process, whatever this machine's is."""


class Probe:
    """Samples the engine and the process, and injects faults.

    Args:
        path: of the samples.
        fault_every_s: mean time between two faults; 0 for none.
    """

    def __init__(self, path: Path, fault_every_s: float):
        self.path = path
        self.faults = 0
        self._fault_every_s = fault_every_s
        self._random = random.Random(0)
        self._next_fault = self._draw()
        self._engine: Engine | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def install(self) -> None:
        """Wrap the engine's and the codec's steps; start sampling when the engine exists."""
        for owner, name in ((Engine, "step"), (Mimi, "decode_step")):
            self._wrap(owner, name)
        make_engine = launch.make_engine

        def make(*args: Any) -> LongForm:
            made = make_engine(*args)
            self._engine = made.engine
            threading.Thread(target=self._sample, daemon=True).start()
            return made

        launch.make_engine = make

    def _draw(self) -> float:
        if not self._fault_every_s:
            return float("inf")
        return time.monotonic() + self._random.expovariate(1 / self._fault_every_s)

    def _wrap(self, owner: type, name: str) -> None:
        original = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            # Half of the faults are left to the codec, which is called within the engine's step.
            if time.monotonic() > self._next_fault and self._random.random() < 0.5:
                self._next_fault = self._draw()
                self.faults += 1
                raise RuntimeError(f"a fault for the soak test, in {name}")
            return original(*args, **kwargs)

        setattr(owner, name, call)

    def _sample(self) -> None:
        engine = self._engine
        assert engine is not None
        start = time.monotonic()
        with open(self.path, "w", buffering=1) as file:
            while True:
                state = {
                    "s": round(time.monotonic() - start, 1),
                    "rss_mib": _rss_mib(),
                    "descriptors": len(os.listdir("/proc/self/fd")),
                    "threads": threading.active_count(),
                    "free_pages": engine._cache.num_free_pages,
                    "rows": len(engine._batch.members),
                    "live": engine.num_live,
                    "waiting": engine.num_waiting,
                    "faults": self.faults,
                }
                file.write(json.dumps(state) + "\n")
                time.sleep(SAMPLE_S)


def _rss_mib() -> float:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_NOFILE, (MAX_DESCRIPTORS, MAX_DESCRIPTORS))
    Probe(Path(sys.argv[1]), float(sys.argv[2])).install()
    sys.exit(launch.main(sys.argv[3:]))
