"""Simulates servers under load: the policy of the real engine over a table of step times.

    python bench/simulate.py loads      from an idle server to twice its capacity
    python bench/simulate.py rules      the policy with one rule left out at a time
    python bench/simulate.py waits      how long a request may wait for its place
    python bench/simulate.py cards      listeners of one card and of several
    python bench/simulate.py whole      whole answers under a constant load of streams
    python bench/simulate.py second     one second of a schedule, drawn: --picture FILE.svg
    python bench/simulate.py measure    step times of the built-in voice here, to be saved
    python bench/simulate.py replay     a record of `run.py serve --record`, beside the simulation

Options:
    --machine NAME    two-cores (default: guessed from two figures), h200 (twice the time of its
                      physical limits), h200-limit, a file that `measure` saved, or the first
                      server of a record
    --streams N       requests at each load (default 1,000)
    --seed N          of arrivals, lengths and step times (default 0)
    --record FILE     replay: the record
    --save FILE       write the results there
    --picture FILE    second: the picture, an SVG

Load 1 is the capacity: the requests a second that a machine could serve if each of its steps were
full and shared by nothing but prompts. That is more than a closed loop of 16 streams reaches. The
texts and the arrivals are those of `run.py serve`; lengths of speech follow the built-in voice. The
last line printed is JSON.
"""

import argparse
import json
import random
from dataclasses import replace
from math import inf
from pathlib import Path

import arrivals
import schedule_picture
import simulated_machines
import simulated_replay
from report import Report
from simulated_engine import Machine, Policy, Simulation, Speech, summary
from simulated_policies import VARIANTS, Variant

from vox_serve.policy import FRAME_S
from vox_serve.text_bound import frames_expected

LOADS = (0.02, 0.25, 0.5, 0.7, 0.8, 0.9, 1.0, 1.25, 2.0)
RULE_LOADS = (0.8, 1.0, 2.0)
WAITS = (0, 1, 2, 5, 10)
CARDS = (1, 2, 4)
LONG_FRAMES = 300
SHORT = "Hello there."

BASE_FRAMES, FRAMES_PER_CHAR, SPREAD = 33, 0.29, 0.31
TOKENS, TOKENS_PER_CHAR = 4, 0.88
"""The built-in voice: frames by characters and their spread (of the logarithm), and positions."""
GPU_FRAMES_PER_CHAR, GPU_TOKENS_PER_CHAR = 0.9, 0.3
"""CSM-1B: 14 characters a second, and the tokens of Llama 3."""

COLUMNS = ["machine", "variant", "load", "listeners", "first p50 ms", "first p95 ms"]
COLUMNS += ["first p99 ms", "gapped", "refused", "goodput", "whole longest s"]


def speech_of(text: str, at_s: float, draw: random.Random, on_gpu: bool) -> Speech:
    """A request with a random length of speech."""
    chars = len(text)
    if on_gpu:
        mean, tokens = 4 + GPU_FRAMES_PER_CHAR * chars, TOKENS + GPU_TOKENS_PER_CHAR * chars
    else:
        mean, tokens = BASE_FRAMES + FRAMES_PER_CHAR * chars, TOKENS + TOKENS_PER_CHAR * chars
    frames = max(int(mean * draw.lognormvariate(0.0, SPREAD)), 3)
    return Speech(at_s, frames, int(tokens), frames_expected(text))


def load_of(rate: float, number: int, seed: int, on_gpu: bool) -> list[Speech]:
    """About `number` requests that arrive at random."""
    times = arrivals.poisson(rate, number / rate, seed)
    draw = random.Random(f"lengths {seed}")
    return [
        speech_of(arrival.text, arrival.at_s, draw, on_gpu)
        for arrival in arrivals.at_times(times, seed)
    ]


def capacity(machine: Machine, speeches: list[Speech]) -> float:
    """Requests a second that full steps serve."""
    rows = machine.streams()
    row_s = machine.rows_s[rows] / rows
    chunk = machine.chunk_tokens
    each_s = [
        s.frames * row_s
        + s.prompt_tokens // chunk * machine.tokens_s[chunk]
        + machine.tokens_s[s.prompt_tokens % chunk]
        for s in speeches
    ]
    return len(each_s) / sum(each_s)


class Cases:
    """The simulations.

    Args:
        machine: of every server.
        report: takes the results.
        number, seed: requests at each load, and the seed of all.
    """

    def __init__(self, machine: Machine, report: Report, number: int, seed: int) -> None:
        self.machine = machine
        self.number = number
        self.seed = seed
        self._report = report
        self._on_gpu = machine.chunk_tokens == simulated_machines.GPU_CHUNK_TOKENS
        self.capacity = capacity(machine, load_of(1.0, 2000, seed, self._on_gpu))

    def speeches(self, load: float, cards: int = 1) -> list[Speech]:
        rate = load * self.capacity * cards
        return load_of(rate, self.number * cards, self.seed, self._on_gpu)

    def loads(self) -> None:
        for load in LOADS:
            for variant in ("deadline", "fifo, 8 places", "fifo, places for all"):
                self._run(variant, load, self.speeches(load))

    def rules(self) -> None:
        for load in RULE_LOADS:
            for variant in VARIANTS:
                self._run(variant, load, self.speeches(load))

    def cards(self) -> None:
        for load in (0.7, 0.8, 0.9):
            for cards in CARDS:
                self._run("deadline", load, self.speeches(load, cards), cards)

    def whole(self) -> None:
        """Every eighth request wants a whole answer."""
        for load in (0.8, 1.0, 2.0):
            speeches = [
                replace(speech, streaming=index % 8 > 0)
                for index, speech in enumerate(self.speeches(load))
            ]
            self._run("deadline", load, speeches)

    def waits(self) -> None:
        for load in RULE_LOADS:
            for wait in WAITS:
                self._run(f"wait up to {wait:g} s", load, self.speeches(load))

    def second(self, picture: Path) -> None:
        """Eight long streams and a short request: when each gets its frames."""
        draw = random.Random(self.seed)
        speeches = [Speech(0.3 * i, LONG_FRAMES, 100 + 20 * i, LONG_FRAMES) for i in range(8)]
        speeches.append(speech_of(SHORT, 5.3, draw, self._on_gpu))
        watched = schedule_picture.Watched()
        simulation = Simulation(self.machine, Policy(), speeches, seed=self.seed, watch=watched)
        outcomes = simulation.run()
        picture.write_text(watched.svg(5.0, 6.0, arrived_s=5.3))
        last = outcomes[-1]
        assert last.first_s is not None
        table = self._report.table("second", ["streams", "short first ms", "gapped"])
        table.add(8, last.first_s * 1e3, sum(outcome.underruns > 0 for outcome in outcomes))

    def replay(self, record: Path) -> None:
        """The requests of a record, and what became of them there and here."""
        simulated_replay.replay(json.loads(record.read_text()), self._report, self.seed)

    def _run(self, name: str, load: float, speeches: list[Speech], cards: int = 1) -> None:
        table = next((t for t in self._report.tables if t.name == "simulated"), None)
        table = table or self._report.table("simulated", COLUMNS)
        variant = {**VARIANTS, **_waiting_variants()}[name]
        if not variant.knows_lengths:
            speeches = [replace(speech, guess=inf) for speech in speeches]
        with variant.policy(self.machine) as rules:
            outcomes = Simulation(self.machine, rules, speeches, cards, self.seed).run()
        figures = summary(speeches, outcomes)
        spoken_s = sum(speech.frames for speech in speeches) * FRAME_S
        listeners = spoken_s / (speeches[-1].at_s - speeches[0].at_s)
        server = self.machine.name if cards == 1 else f"{cards} x {self.machine.name}"
        table.add(server, name, load, listeners, *(figures[column] for column in COLUMNS[4:]))


def _waiting_variants() -> dict[str, Variant]:
    """The policy with other bounds on waiting."""
    return {
        f"wait up to {wait:g} s": Variant(lambda _, wait=wait: Policy(max_wait_s=wait))
        for wait in WAITS
    }


def machine_named(name: str) -> Machine:
    """A machine by its name or file.

    Raises:
        OSError: there is no such name and no such file.
    """
    if name == "two-cores":
        return simulated_machines.two_cores()
    if name in ("h200", "h200-limit"):
        return simulated_machines.h200(2.0 if name == "h200" else 1.0)
    described = json.loads(Path(name).read_text())
    if "straight" in described:
        return simulated_machines.straight(**described["straight"])
    return simulated_replay.machine_in(described)


def main() -> None:
    parser = argparse.ArgumentParser(
        usage="python bench/simulate.py CASE [options]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    cases = ("loads", "rules", "waits", "cards", "whole", "second", "measure", "replay")
    parser.add_argument("case", choices=cases)
    parser.add_argument("--machine", default="two-cores")
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", type=Path)
    parser.add_argument("--save", type=Path)
    parser.add_argument("--picture", type=Path)
    args = parser.parse_args()
    if args.case == "measure":
        measured = simulated_machines.measure()
        if args.save:
            args.save.write_text(json.dumps(measured, indent=1) + "\n")
        print(json.dumps(measured))
        return
    report = Report()
    report.path = args.save
    simulated = Cases(machine_named(args.machine), report, args.streams, args.seed)
    if args.case == "second":
        simulated.second(args.picture or parser.error("second needs --picture FILE.svg"))
    elif args.case == "replay":
        simulated.replay(args.record or parser.error("replay needs --record FILE"))
    else:
        getattr(simulated, args.case)()
    print(f"\n{report.json()}")


if __name__ == "__main__":
    main()
