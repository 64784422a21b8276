"""Which requests a step serves: the rules of `policy`, one test each."""

from vox_serve.policy import Row, choose_step
from vox_serve.step_times import StepTimes

CHUNK_TOKENS = 64


def cpu_times() -> StepTimes:
    """2 ms a step, 3 ms a row and 0.2 ms a prompt token."""
    times = StepTimes()
    for rows in (1, 2, 4, 8, 16, 32):
        times.observe(rows, 0, 0.002 + 0.003 * rows)
    for tokens in (8, 16, 64):
        times.observe(1, tokens, 0.005 + 0.0002 * tokens)
    return times


def stream(name: str, slack_s: float) -> Row:
    """A stream with so many seconds of audio in hand, at time 0."""
    return Row(name, moved_s=0.0, num_frames=10, due_s=slack_s)


def names(rows: list[Row]) -> list[str]:
    return [row.id for row in rows]


def test_a_newcomer_has_the_step_to_itself_while_the_others_are_ahead() -> None:
    rows = [stream(f"stream {i}", slack_s=1.0) for i in range(8)]
    newcomer = Row("newcomer", moved_s=0.0, num_missing=14)
    step = choose_step([*rows, newcomer], 0.0, cpu_times(), CHUNK_TOKENS)
    assert step.frames == []
    assert step.prompts == [(newcomer, 14)]
