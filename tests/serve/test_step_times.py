"""Step times that are learnt: robust, forgetful, and useful before the first step."""

import numpy as np
import pytest

from vox_serve.step_times import WINDOW, StepTimes


def test_eight_rows_are_taken_for_possible_before_anything_is_measured() -> None:
    assert 0.02 < StepTimes().seconds(8) <= 0.08


def test_a_line_is_learnt_from_a_few_sizes() -> None:
    times = StepTimes()
    for rows in (1, 4, 16, 32):
        times.observe(rows, 0, 0.002 + 0.003 * rows)
    for rows in (1, 2, 10, 24, 32):
        assert times.seconds(rows) == pytest.approx(0.002 + 0.003 * rows)


def test_stairs_are_learnt() -> None:
    times = StepTimes()
    for rows in range(1, 33):
        times.observe(rows, 0, 0.002 if rows <= 16 else 0.004)
    assert times.seconds(16) == pytest.approx(0.002)
    assert times.seconds(24) == pytest.approx(0.004)


def test_steps_that_were_never_tried_take_time_in_proportion() -> None:
    times = StepTimes()
    times.observe(4, 0, 0.01)
    assert times.seconds(40) == pytest.approx(0.1)


def test_prompt_tokens_come_on_top_of_rows() -> None:
    times = StepTimes()
    times.observe(2, 0, 0.008)
    times.observe(2, 16, 0.011)
    times.observe(2, 32, 0.014)
    assert times.seconds(2, 16) == pytest.approx(0.011)
    assert times.seconds(1, 24) - times.seconds(1) == pytest.approx(0.0045)
    assert times.tokens_within(0.0045, most=64) == 24
    assert times.tokens_within(0.0045, most=20) == 20
    assert times.tokens_within(0.001, most=64) == 0


def test_a_paused_machine_changes_nothing() -> None:
    times = StepTimes()
    for _ in range(9):
        times.observe(4, 0, 0.01)
    times.observe(4, 0, 2.0)
    assert times.seconds(4) == pytest.approx(0.01)


def test_a_machine_that_became_slower_is_believed() -> None:
    times = StepTimes()
    for seconds in (0.01, 0.02):
        for _ in range(WINDOW):
            times.observe(4, 0, seconds)
    assert times.seconds(4) == pytest.approx(0.02)


def test_slow_is_how_much_longer_one_step_in_twenty_takes() -> None:
    times = StepTimes()
    for index in range(120):
        times.observe(4, 0, 0.013 if index % 10 == 9 else 0.01)
    assert times.slow == pytest.approx(1.3)


def test_a_table_holds_all_sizes() -> None:
    times = StepTimes()
    for rows in (1, 8, 64):
        times.observe(rows, 0, 0.001 * rows)
    table = times.table(100)
    assert len(table) > 100
    np.testing.assert_allclose(table[:101], 0.001 * np.arange(101), rtol=1e-12)


def test_a_summary_has_medians_and_how_far_steps_were_from_them() -> None:
    times = StepTimes()
    for index in range(40):
        times.observe(2, 0, 0.010 + 0.001 * (index % 2))
    times.observe(2, 16, 0.015)
    summary = times.summary()
    assert summary["rows"] == {2: pytest.approx(10, abs=1)}
    assert summary["prompt_tokens"] == {16: pytest.approx(5, abs=1)}
    ratios = summary["measured_over_predicted"]
    assert ratios == sorted(ratios)
    assert 0 < ratios[0] < 1 <= ratios[-1]


def test_a_machine_that_is_slower_for_a_moment_is_noticed_at_once() -> None:
    times = StepTimes()
    for _ in range(200):
        times.observe(4, 0, 0.01)
    assert times.lately == pytest.approx(1.0)
    for _ in range(10):
        times.observe(4, 0, 0.016)
    assert times.seconds(4) == pytest.approx(0.01)
    assert 1.05 < times.lately < 1.2
    times.observe(4, 0, 9.0)  # a pause says nothing
    assert times.lately < 1.25
