"""The policy with one rule left out at a time, for bench/simulate.py."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from unittest import mock

from simulated_engine import Machine, Policy

from vox_serve import admission, due_rows, policy
from vox_serve.fifo import choose_all
from vox_serve.policy import Row, Step, choose_step
from vox_serve.step_times import StepTimes

TURN_S = 1.0
"""A newcomer without precedence is due so long after it came."""


def no_parking(rows: Sequence[Row], now_s: float, times: StepTimes, chunk_tokens: int) -> Step:
    """Newcomers' prompts first, but all rows in every step."""
    step = choose_step(rows, now_s, times, chunk_tokens)
    return Step([row for row in rows if not row.num_missing and not row.is_new], step.prompts)


def no_precedence(rows: Sequence[Row], now_s: float, times: StepTimes, chunk_tokens: int) -> Step:
    """Newcomers are rows like others, whose first frame is due a second after they came."""
    owners: dict[str, Row] = {row.id: row for row in rows}
    guests = [
        replace(row, num_frames=1, due_s=row.moved_s + TURN_S) if row.is_new else row
        for row in rows
    ]
    step = choose_step(guests, now_s, times, chunk_tokens)
    return Step(
        [owners[row.id] for row in step.frames],
        [(owners[row.id], tokens) for row, tokens in step.prompts],
    )


def admit_all(*_: object) -> bool:
    return True


def admit_by_number(
    rows: Sequence[Row],
    now_s: float,
    times: StepTimes,
    streams: bool,
    frames: float,
    spread: float,
) -> bool:
    """As many streams as the device makes in time, however far ahead they are."""
    one_more = len(rows) + 1
    return times.seconds(one_more) <= admission.MAX_LOAD * policy.FRAME_S


@dataclass(frozen=True)
class Variant:
    """A policy, and constants of modules that differ meanwhile."""

    make: Callable[[Machine], Policy]
    constants: tuple[tuple[object, str, float], ...] = ()
    knows_lengths: bool = True

    @contextmanager
    def policy(self, machine: Machine) -> Iterator[Policy]:
        """The policy; the constants hold inside the block."""
        patches = [mock.patch.object(*constant) for constant in self.constants]
        for patch in patches:
            patch.start()
        try:
            yield self.make(machine)
        finally:
            for patch in patches:
                patch.stop()


UNBOUNDED_S = 1e9
VARIANTS = {
    "deadline": Variant(lambda _: Policy()),
    "fifo, 8 places": Variant(lambda _: Policy(choose_all, admit_all, UNBOUNDED_S, most_rows=8)),
    "fifo, places for all": Variant(
        lambda machine: Policy(choose_all, admit_all, UNBOUNDED_S, machine.streams())
    ),
    "no newcomers first": Variant(lambda _: Policy(no_precedence)),
    "no parking": Variant(lambda _: Policy(no_parking)),
    "full steps": Variant(lambda _: Policy(), ((policy, "EFFICIENT", 1.0), (policy, "BEST", 1.0))),
    "prompts in parts": Variant(lambda _: Policy(), ((policy, "WHOLE_TOKENS", 0),)),
    "no reserve": Variant(lambda _: Policy(), ((due_rows, "RESERVE_S", 0.0),)),
    "no admission": Variant(lambda _: Policy(choose_step, admit_all, UNBOUNDED_S)),
    "admission by number": Variant(lambda _: Policy(choose_step, admit_by_number)),
    "lengths not learnt": Variant(lambda _: Policy(learns=False)),
    "lengths unknown": Variant(lambda _: Policy(), knows_lengths=False),
}
