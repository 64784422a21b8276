"""The simulator: its arithmetic, checked by hand on small cases. Nothing is timed."""

import xml.etree.ElementTree as ElementTree

import pytest
import schedule_picture
import simulate
import simulated_machines
import simulated_replay
from simulated_engine import Machine, Outcome, Policy, Simulation, Speech, summary
from simulated_policies import VARIANTS, admit_all

from vox_serve.fifo import choose_all

STEP_S, ROW_S, TOKEN_S = 0.004, 0.002, 0.001
MACHINE = Machine(
    "by hand",
    [STEP_S + ROW_S * rows if rows else 0.0 for rows in range(65)],
    [TOKEN_S * tokens for tokens in range(513)],
    chunk_tokens=64,
    overhead_s=0.003,
)
FIFO = Policy(choose_all, admit_all, max_wait_s=1e9, most_rows=2)


def run(policy: Policy, *speeches: Speech, servers: int = 1) -> list[Outcome]:
    return Simulation(MACHINE, policy, speeches, servers).run()


@pytest.mark.parametrize("policy", [FIFO, Policy()])
def test_one_request_takes_its_prompt_and_one_step_a_frame(policy):
    [outcome] = run(policy, Speech(1.0, frames=3, prompt_tokens=70))
    first_s = 70 * TOKEN_S + STEP_S + ROW_S + MACHINE.overhead_s
    assert outcome.first_s == pytest.approx(first_s)
    assert outcome.end_s == pytest.approx(first_s + 2 * (STEP_S + ROW_S))
    assert not outcome.underruns
    assert not outcome.refused


def test_a_place_is_free_when_a_speech_ends():
    outcomes = run(FIFO, *[Speech(0.0, frames=2, prompt_tokens=10)] * 3)
    both_s = 20 * TOKEN_S + 2 * (STEP_S + 2 * ROW_S)
    assert outcomes[2].first_s == pytest.approx(
        both_s + 10 * TOKEN_S + STEP_S + ROW_S + MACHINE.overhead_s
    )


def test_frames_that_come_too_late_are_counted():
    slow = Machine("slow", [0.1] * 9, [0.0] * 65, 64)
    outcomes = Simulation(slow, FIFO, [Speech(0.0, frames=4, prompt_tokens=1)]).run()
    assert outcomes[0].underruns == 3


def test_requests_that_would_wait_too_long_are_refused_at_once():
    crowd = [Speech(0.0, frames=100, prompt_tokens=1, guess=100)] * 3
    policy = Policy(choose_all, lambda *_: False, max_wait_s=0.5)
    outcomes = run(policy, *crowd)
    assert [outcome.refused for outcome in outcomes] == [False, True, True]
    assert outcomes[1].refused_s == 0.0


def test_each_request_goes_to_the_server_with_the_fewest():
    outcomes = run(Policy(), *[Speech(0.0, frames=9, prompt_tokens=1)] * 4, servers=2)
    assert [outcome.server for outcome in outcomes] == [0, 1, 0, 1]


def test_a_summary_counts_streams_alone():
    speeches = [Speech(float(at), 5, 1) for at in range(4)] + [Speech(4.0, 5, 1, streaming=False)]
    outcomes = [
        Outcome(first_s=0.1, end_s=1.0),
        Outcome(first_s=0.3, end_s=1.0, underruns=2),
        Outcome(first_s=0.2, end_s=1.0),
        Outcome(refused=True),
        Outcome(first_s=9.0, end_s=12.0),
    ]
    figures = summary(speeches, outcomes)
    assert (figures["streams"], figures["gapped"], figures["refused"]) == (4, 1, 1)
    assert figures["first p50 ms"] == pytest.approx(200)
    assert figures["goodput"] == pytest.approx(2 / 16.0)
    assert figures["whole longest s"] == 12.0


def test_equal_seeds_give_equal_figures():
    cases = simulate.Cases(simulated_machines.two_cores(), simulate.Report(), number=60, seed=3)
    speeches = cases.speeches(0.5)
    first, second = (Simulation(cases.machine, Policy(), speeches, seed=3).run() for _ in range(2))
    assert first == second


def test_capacity_is_what_full_steps_serve():
    speeches = [Speech(0.0, frames=100, prompt_tokens=74)]
    rows = MACHINE.streams()
    assert rows == 38
    each_s = 100 * (STEP_S / rows + ROW_S) + 74 * TOKEN_S
    assert simulate.capacity(MACHINE, speeches) == pytest.approx(1 / each_s)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_serves_all_requests_of_a_light_load(name):
    cases = simulate.Cases(simulated_machines.two_cores(), simulate.Report(), number=30, seed=0)
    speeches = cases.speeches(0.3)
    with VARIANTS[name].policy(cases.machine) as policy:
        outcomes = Simulation(cases.machine, policy, speeches).run()
    assert all(outcome.end_s is not None for outcome in outcomes)
    assert summary(speeches, outcomes)["gapped"] == 0


def test_a_gpu_of_physical_limits_has_stairs_and_reads_its_weights():
    machine = simulated_machines.h200(1.0)
    assert machine.rows_s[1] == pytest.approx(9.016e9 / 4.3e12)
    assert machine.rows_s[1601] == machine.rows_s[1616] > machine.rows_s[1600]


def test_the_picture_shows_every_row_of_its_second():
    watched = schedule_picture.Watched()
    speeches = [Speech(0.1 * i, 100, 20) for i in range(3)]
    Simulation(MACHINE, Policy(), speeches, watch=watched).run()
    picture = ElementTree.fromstring(watched.svg(0.0, 1.0, arrived_s=0.2))
    texts = [element.text for element in picture.iter("{http://www.w3.org/2000/svg}text")]
    assert {"stream 1", "stream 2", "newcomer", "1000 ms"} <= set(texts)


def record_of(speeches: list[Speech], texts: list[str]) -> dict:
    """A record of the simulated server, as `run.py serve --record` would write it."""
    policy = Policy(max_wait_s=30.0, most_rows=8)
    outcomes = Simulation(MACHINE, policy, speeches).run()
    requests = [
        {
            "at_s": speech.at_s,
            "text": text,
            "frames": speech.frames,
            "streaming": speech.streaming,
            "status": 200,
            "first_audio_s": outcome.first_s,
            "end_s": outcome.end_s,
            "underruns": outcome.underruns,
        }
        for speech, text, outcome in zip(speeches, texts, outcomes, strict=True)
    ]
    step_ms = {
        "rows": {str(n): 1e3 * MACHINE.rows_s[n] for n in (1, 2, 4, 8)},
        "prompt_tokens": {str(n): 1e3 * MACHINE.tokens_s[n] for n in (1, 16, 64)},
        "measured_over_predicted": [1.0, 1.0, 1.0],
    }
    health = {"step_ms": step_ms, "max_batch_size": 8}
    cases = {"quiet": requests[:3], "poisson": requests[3:]}
    loads = [
        {"server": "ours", "case": case, "load": 0.5, "requests": requests}
        for case, requests in cases.items()
    ]
    return {"machine": {"servers": {"ours": {"flags": [], "health": health}}}, "loads": loads}


def test_a_replay_of_a_simulated_record_gives_its_figures(monkeypatch):
    monkeypatch.setattr(simulated_replay, "DELIVERY_S", MACHINE.overhead_s)
    texts = [f"{'Again and ' * (1 + i % 4)}again." for i in range(15)]
    speeches = [
        Speech(
            10.0 * i if i < 3 else 60 + 0.2 * i,
            frames=30 + i,
            prompt_tokens=int(4 + 0.88 * len(text)),
            guess=len(text) + 12,
        )
        for i, text in enumerate(texts)
    ]
    report, record = simulate.Report(), record_of(speeches, texts)
    simulated_replay.replay(record, report, seed=0)
    [table] = report.tables
    [row] = table.rows
    figures = dict(zip(table.columns, row, strict=True))
    assert (figures["case"], figures["streams"]) == ("poisson", 12)
    assert figures["simulated p95 ms"] == pytest.approx(figures["first p95 ms"], rel=0.02)
    assert figures["simulated p50 ms"] == pytest.approx(figures["first p50 ms"], rel=0.02)
    assert figures["simulated gaps"] == figures["with gaps"]
    assert figures["refused"] == figures["simulated refused"] == 0
    assert simulated_replay.machine_in(record).rows_s[8] == pytest.approx(MACHINE.rows_s[8])


def test_a_record_without_step_times_cannot_be_replayed():
    with pytest.raises(ValueError, match="step_ms"):
        simulated_replay.machine_of({"health": None}, [])
