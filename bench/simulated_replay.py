"""Replays a record of `bench/run.py serve --record` in the simulator, beside what was measured.

The machine is the one that the record describes: its server reports the step times that it has
learnt (`step_ms` of /health). The time from a client to the server's line, and back from a step to
the client, follows from the record's requests that came one after another (the case `quiet`).
"""

import statistics
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice, pairwise
from typing import Any

from playback import percentile
from report import Report
from simulated_engine import Machine, Outcome, Policy, Simulation, Speech
from simulated_machines import CPU_CHUNK_TOKENS, MOST_ROWS, MOST_TOKENS
from simulated_policies import UNBOUNDED_S, admit_all

from vox_serve.config import ServerSettings
from vox_serve.fifo import choose_all
from vox_serve.step_times import StepTimes
from vox_serve.text_bound import frames_expected

TOKENS, TOKENS_PER_CHAR = 4, 0.88
"""Positions of a prompt of the built-in voice."""

PAUSE_S = 60.0
"""Time between two loads of the replay; the server rests meanwhile."""

DELIVERY_S = 0.002
"""From a step's end to the client; the rest of what a quiet request takes is before the line."""

CLOSED_LOOPS = ("quiet", "capacity")
"""Here requests wait for each other, which a replay cannot show: the server only learns by them."""

COLUMNS = ["server", "case", "load", "streams", "first p50 ms", "simulated p50 ms"]
COLUMNS += ["first p95 ms", "simulated p95 ms", "with gaps", "simulated gaps"]
COLUMNS += ["refused", "simulated refused"]

Request = dict[str, Any]


def replay(record: dict[str, Any], report: Report, seed: int) -> None:
    """Add a table with a row for each load of a record: measured and simulated."""
    table = report.table("replay", COLUMNS)
    for name, server in record["machine"]["servers"].items():
        loads = [
            {**load, "requests": [each for each in load["requests"] if each["frames"]]}
            for load in record["loads"]
            if load["server"] == name
        ]
        for load, outcomes in zip(loads, _simulated(server, loads, seed), strict=True):
            if load["case"] in CLOSED_LOOPS or not outcomes:
                continue
            streaming = [each["streaming"] for each in load["requests"]]
            there, here = (_figures(each, streaming) for each in (_measured(load), outcomes))
            pairs = [figure for pair in zip(there, here, strict=True) for figure in pair]
            table.add(name, load["case"], load["load"], len(outcomes), *pairs)


def machine_of(server: dict[str, Any], quiet: Sequence[Request]) -> Machine:
    """The machine of a server.

    Args:
        server: its description in a record.
        quiet: requests that came one after another.

    Raises:
        ValueError: the record has no step times, or no quiet requests.
    """
    learnt = (server["health"] or {}).get("step_ms", {"rows": {}})
    if not learnt["rows"] or not quiet:
        raise ValueError("the record needs a server with step_ms in /health, and the case quiet")
    times = StepTimes()
    for rows, ms in learnt["rows"].items():
        times.observe(int(rows), 0, ms / 1e3)
    row_s = times.seconds(1)
    for tokens, ms in learnt["prompt_tokens"].items():
        times.observe(1, int(tokens), row_s + ms / 1e3)
    tokens_s = [0.0, *times.prompts_s(range(1, MOST_TOKENS + 1)).tolist()]
    ratios = learnt["measured_over_predicted"]
    outer = len(ratios) // 4  # steps that were predicted wrongly, rather than slow
    machine = Machine(
        "of the record",
        times.table(MOST_ROWS).tolist(),
        tokens_s,
        CPU_CHUNK_TOKENS,
        ratios=ratios[outer : len(ratios) - outer],
    )
    speeches = [replace(_speech(each), at_s=PAUSE_S * at) for at, each in enumerate(quiet)]
    outcomes = Simulation(machine, Policy(), speeches).run()
    overhead_s = statistics.median(
        each["first_audio_s"] - (outcome.first_s or 0.0)
        for each, outcome in zip(quiet, outcomes, strict=True)
    )
    prepare_s = max(overhead_s - DELIVERY_S, 0.0)
    return replace(machine, overhead_s=overhead_s, prepare_s=prepare_s)


def machine_in(record: dict[str, Any]) -> Machine:
    """The machine of a record's first server; see `machine_of`."""
    name, server = next(iter(record["machine"]["servers"].items()))
    loads = [each for each in record["loads"] if each["server"] == name]
    return machine_of(server, _quiet(loads))


def _quiet(loads: list[dict[str, Any]]) -> list[Request]:
    return [each for load in loads if load["case"] == "quiet" for each in load["requests"]]


def _simulated(
    server: dict[str, Any], loads: list[dict[str, Any]], seed: int
) -> list[list[Outcome]]:
    """The outcomes of the requests of each load, one load after another on the same server."""
    machine = machine_of(server, _quiet(loads))
    speeches: list[Speech] = []
    start_s = 0.0
    for load in loads:
        speeches += [_speech(each, start_s) for each in load["requests"]]
        ends_s = [each["at_s"] + each["end_s"] for each in load["requests"]]
        start_s += PAUSE_S + max(ends_s, default=0.0)
    outcomes = iter(Simulation(machine, _policy(server), speeches, seed=seed).run())
    return [list(islice(outcomes, len(load["requests"]))) for load in loads]


def _speech(request: Request, start_s: float = 0.0) -> Speech:
    chars = len(request["text"])
    return Speech(
        start_s + request["at_s"],
        request["frames"],
        int(TOKENS + TOKENS_PER_CHAR * chars),
        frames_expected(request["text"]),
        request["streaming"],
    )


def _policy(server: dict[str, Any]) -> Policy:
    """The policy that a server's flags choose."""
    flags, places = server["flags"] or [], server["health"]["max_batch_size"]
    chosen = dict(pairwise(flags))
    if chosen.get("--policy") == "fifo":
        return Policy(choose_all, admit_all, UNBOUNDED_S, places)
    default_s = ServerSettings().max_wait_s
    return Policy(max_wait_s=float(chosen.get("--max_wait_s", default_s)), most_rows=places)


def _measured(load: dict[str, Any]) -> list[Outcome]:
    return [
        Outcome(
            refused=each["status"] in (429, 503),
            first_s=each["first_audio_s"],
            underruns=each["underruns"],
        )
        for each in load["requests"]
    ]


def _figures(outcomes: Sequence[Outcome], streaming: Sequence[bool]) -> list[float | None]:
    """The measured ones of `COLUMNS`, of streams."""
    streams = [outcome for outcome, is_one in zip(outcomes, streaming, strict=True) if is_one]
    firsts = [each.first_s for each in streams if each.first_s is not None]
    percentiles = [percentile(firsts, percent) for percent in (50, 95)]
    return [
        *(None if seconds is None else 1e3 * seconds for seconds in percentiles),
        sum(each.underruns > 0 for each in streams),
        sum(each.refused for each in streams),
    ]
