"""Waits are predicted by the pace of the line. Times are seconds."""

import pytest

from vox_serve.admission import wait_s
from vox_serve.deadlines import Row
from vox_serve.line_pace import LinePace
from vox_serve.step_times import StepTimes


def rows() -> list[Row]:
    return [Row(f"{i}", 0.0, num_frames=1, frames_expected=50, due_s=0.1) for i in range(3)]


def moved(interval_s: float, number: int, num_waiting: int = 5) -> LinePace:
    pace = LinePace()
    for index in range(number):
        pace.admitted(interval_s * index, num_waiting)
    return pace


def test_a_line_moves_as_it_moved_before():
    pace = moved(0.5, 20)
    now_s = 0.5 * 19
    waits = [pace.wait_s(rows(), now_s, StepTimes(), ahead) for ahead in range(3)]
    assert waits == pytest.approx([0.5, 1.0, 1.5])


def test_a_line_that_stands_still_takes_longer():
    assert moved(0.5, 20).wait_s(rows(), 0.5 * 19 + 4.0, StepTimes(), 1) == pytest.approx(4.5)


@pytest.mark.parametrize("pace", [LinePace(), moved(0.5, 3), moved(0.5, 20, num_waiting=0)])
def test_before_a_line_has_moved_the_speech_that_is_left_decides(pace):
    assert pace.wait_s(rows(), 9.5, StepTimes(), 1) == wait_s(rows(), 9.5, StepTimes(), 1)


def test_a_new_pace_is_learnt():
    pace = moved(0.5, 20)
    for index in range(60):
        pace.admitted(9.6 + 0.1 * index, 5)
    assert pace.wait_s(rows(), 15.5, StepTimes(), 0) == pytest.approx(0.1, rel=0.5)
