"""The rules by which a step's requests are chosen, one test each. Times are seconds, now is 0."""

import math

import pytest

from vox_serve.admission import MAX_LOAD, WAIT_MARGIN, can_admit, wait_s
from vox_serve.deadlines import FRAME_S, WHOLE_FRAME_S, Row
from vox_serve.due_rows import WHOLE_RANK_S, WHOLE_WAIT_S
from vox_serve.policy import FEW_TOKENS, STARVED_S, WHOLE_TOKENS, Step, choose_step
from vox_serve.step_times import STALE_STEPS, StepTimes

CHUNK_TOKENS = 64
STEP_S, ROW_S, TOKEN_S = 0.002, 0.003, 0.0002


def cpu_times() -> StepTimes:
    """2 ms a step, 3 ms a row and 0.2 ms a prompt token: 26 rows in the time of a frame."""
    times = StepTimes()
    for rows in (1, 2, 4, 8, 16, 32, 64):
        times.observe(rows, 0, STEP_S + ROW_S * rows)
    for tokens in (8, 16, 64):
        times.observe(1, tokens, STEP_S + ROW_S + TOKEN_S * tokens)
    return times


def gpu_times() -> StepTimes:
    """2 ms up to 16 rows, and 2 ms for every 16 more; a prompt takes as long as 16 rows."""
    times = StepTimes()
    for rows in range(1, 65):
        times.observe(rows, 0, 0.002 * math.ceil(rows / 16))
    for tokens in (16, 64):
        times.observe(1, tokens, 0.004)
    return times


def stream(name: str, in_hand_s: float, num_missing: int = 0) -> Row:
    """A stream whose listener has so many seconds of audio in hand."""
    return Row(name, moved_s=0.0, num_missing=num_missing, num_frames=10, due_s=in_hand_s)


def streams(number: int, in_hand_s: float) -> list[Row]:
    return [stream(f"stream {i}", in_hand_s) for i in range(number)]


def newcomer(name: str = "newcomer", num_missing: int = 14, waited_s: float = 0.0) -> Row:
    return Row(name, moved_s=-waited_s, num_missing=num_missing)


def whole(name: str, waited_s: float = 0.0, num_missing: int = 0) -> Row:
    return Row(name, -waited_s, streams=False, num_missing=num_missing, num_frames=5)


def choose(rows: list[Row], times: StepTimes | None = None) -> Step:
    return choose_step(rows, 0.0, times or cpu_times(), CHUNK_TOKENS)


def frames(step: Step) -> list[str]:
    return [row.id for row in step.frames]


def prompts(step: Step) -> list[tuple[str, int]]:
    return [(row.id, tokens) for row, tokens in step.prompts]


class TestWhatIsDue:
    def test_rows_that_cannot_wait_for_the_next_step_are_in_this_one(self) -> None:
        due = [stream("due", 0.045), stream("also due", 0.047)]
        step = choose([*streams(6, 1.0), *due, newcomer()])
        assert frames(step) == ["due", "also due"]

    def test_those_that_are_due_first_come_first(self) -> None:
        rows = [stream(name, s) for name, s in (("c", 0.9), ("a", 0.5), ("b", 0.7))]
        assert frames(choose(rows))[0] == "a"

    def test_a_step_ends_before_its_first_frame_is_due(self) -> None:
        # All are due soon, but a step of all takes 74 ms.
        step = choose([stream("first", 0.04), *streams(23, 0.1)])
        assert frames(step)[0] == "first"
        assert STEP_S + ROW_S * len(step.frames) <= 0.04

    def test_a_row_that_is_late_anyway_makes_no_other_late(self) -> None:
        step = choose([stream("late", -0.5), *streams(20, 0.03)])
        assert frames(step)[0] == "late"
        assert STEP_S + ROW_S * len(step.frames) <= 0.03

    def test_the_next_part_of_a_long_text_is_prefilled_before_newcomers_if_it_presses(self) -> None:
        part = stream("next part", in_hand_s=0.04, num_missing=60)
        assert prompts(choose([part, newcomer()]))[0][0] == "next part"
        part.due_s = 2.0
        assert prompts(choose([part, newcomer()])) == [("newcomer", 14)]


class TestNewcomers:
    def test_a_newcomer_has_the_step_to_itself_while_the_others_are_ahead(self) -> None:
        step = choose([*streams(8, 1.0), newcomer()])
        assert (frames(step), prompts(step)) == ([], [("newcomer", 14)])

    def test_rows_that_cost_nothing_ride_along(self) -> None:
        step = choose([*streams(40, 1.0), newcomer()], gpu_times())
        assert len(step.frames) == 15
        assert prompts(step) == [("newcomer", 14)]

    def test_a_prompt_is_cut_to_what_fits_before_the_next_frame_is_due(self) -> None:
        step = choose([stream("due", 0.047), newcomer(num_missing=64)])
        assert frames(step) == ["due"]
        [(_, tokens)] = prompts(step)
        assert FEW_TOKENS <= tokens < 64
        assert STEP_S + ROW_S + TOKEN_S * tokens <= 0.047

    def test_a_long_prompt_is_prefilled_at_once_if_no_frame_is_due_meanwhile(self) -> None:
        assert prompts(choose([newcomer(num_missing=300)])) == [("newcomer", 300)]
        rows = [*streams(8, 1.0), newcomer(num_missing=300)]
        assert prompts(choose(rows)) == [("newcomer", 300)]
        rows[0].due_s = 300 * TOKEN_S
        assert prompts(choose(rows)) == [("newcomer", CHUNK_TOKENS)]
        rows = [newcomer("short"), newcomer("long", num_missing=300)]
        assert sum(tokens for _, tokens in prompts(choose(rows))) <= CHUNK_TOKENS
        most = WHOLE_TOKENS
        assert prompts(choose([newcomer(num_missing=2 * most)])) == [("newcomer", most)]

    @pytest.mark.parametrize(("waited_s", "tokens"), [(0.0, []), (STARVED_S + 0.1, [FEW_TOKENS])])
    def test_a_prompt_that_fits_nowhere_waits_but_not_for_ever(
        self, waited_s: float, tokens: list[int]
    ) -> None:
        step = choose([*streams(4, 0.016), newcomer(num_missing=64, waited_s=waited_s)])
        assert [n for _, n in prompts(step)] == tokens

    def test_the_shortest_prompt_goes_first_until_another_has_waited_longer(self) -> None:
        long, short = newcomer("long", 320), newcomer("short", 14)
        assert prompts(choose([long, short]))[0] == ("short", 14)
        long.moved_s = -0.2
        assert prompts(choose([long, short]))[0] == ("long", 320)

    def test_a_client_that_speaks_nothing_else_goes_before_one_that_does(self) -> None:
        other = newcomer("other")
        other.urgent = False
        assert prompts(choose([other, newcomer()]))[0][0] == "newcomer"

    def test_a_cpu_serves_few_newcomers_at_once_and_a_gpu_as_many_as_cost_nothing(self) -> None:
        rows = [newcomer(f"{i}", num_missing=4) for i in range(8)]
        assert len(choose(rows, cpu_times()).prompts) < 4
        assert len(choose(rows, gpu_times()).prompts) == 8

    def test_a_newcomer_whose_prompt_is_complete_gets_its_frame(self) -> None:
        assert prompts(choose([newcomer(num_missing=0)])) == [("newcomer", 0)]


class TestStepsThatNobodyHurries:
    def test_steps_are_smaller_while_that_costs_little_and_supplies_all_listeners(self) -> None:
        step = choose(streams(8, 1.0))
        assert ROW_S / (STEP_S / len(step.frames) + ROW_S) > 0.7
        assert len(step.frames) < 6

    def test_steps_are_full_when_splitting_them_would_cost_too_much(self) -> None:
        assert len(choose(streams(24, 1.0)).frames) >= 22

    def test_rows_go_on_when_nobody_needs_the_step(self) -> None:
        assert frames(choose([stream("far ahead", 60.0)])) == ["far ahead"]

    def test_there_is_always_some_work(self) -> None:
        for row in (stream("a", -9.0), newcomer(), whole("w"), whole("p", num_missing=9)):
            step = choose([row], StepTimes())
            assert step.frames or step.prompts

    @pytest.mark.parametrize("number", [4, 8, 20])
    def test_larger_steps_are_tried_where_nothing_is_known_of_them(self, number: int) -> None:
        times = StepTimes()
        for _ in range(9):
            times.observe(2, 0, 0.0076)
        assert len(choose(streams(number, 1.0), times).frames) == number

    @pytest.mark.parametrize("in_hand_s", [0.15, 0.3, 1.0])
    def test_a_size_that_seemed_slow_is_tried_again_later(self, in_hand_s: float) -> None:
        times = StepTimes()
        times.observe(1, 0, STEP_S + ROW_S)
        times.observe(6, 0, 0.5)
        sizes = []
        for _ in range(2 * STALE_STEPS + 9):
            sizes.append(len(choose(streams(6, in_hand_s), times).frames))
            times.observe(sizes[-1], 0, STEP_S + ROW_S * sizes[-1])
        assert sizes[0] < 6
        assert 6 in sizes
        assert times.seconds(6) == pytest.approx(STEP_S + ROW_S * 6)


class TestWholeAnswers:
    def test_they_take_the_place_of_streams_that_are_ahead(self) -> None:
        step = choose([*streams(8, 5.0), whole("answer")])
        assert "answer" in frames(step)

    def test_they_never_come_before_a_stream_with_little_in_hand(self) -> None:
        late = whole("answer", waited_s=WHOLE_WAIT_S - 0.1)
        rows = streams(20, WHOLE_RANK_S - 0.05)
        assert choose([late, *rows]).frames[:20] == rows
        times = cpu_times()
        times.observe(21, 0, STEP_S + ROW_S * 21)  # nobody has to try such a step
        assert "answer" not in frames(choose([late, *rows], times))

    def test_the_one_that_waited_longest_is_in_after_a_second_whatever_is_due(self) -> None:
        waiting = [whole("longer", WHOLE_WAIT_S + 0.2), whole("long", WHOLE_WAIT_S + 0.1)]
        step = choose([*streams(20, 0.03), *waiting])
        assert frames(step)[-1] == "longer"
        assert "long" not in frames(step)
        step = choose([*streams(4, 0.016), newcomer(), waiting[0]])
        assert "longer" in frames(step)

    def test_a_prompt_that_waited_a_second_is_prefilled_before_newcomers(self) -> None:
        late = whole("answer", WHOLE_WAIT_S + 0.1, num_missing=30)
        assert prompts(choose([*streams(2, 1.0), newcomer(), late]))[0] == ("answer", 30)

    def test_each_ends_within_a_bound_while_newcomers_never_stop(self) -> None:
        times, now_s = cpu_times(), 0.0
        answers = [whole(f"{i}") for i in range(4)]
        longest_s = 0.0
        for index in range(2000):
            fresh = Row(f"new {index}", now_s, num_missing=14)
            step = choose_step([fresh, *answers], now_s, times, CHUNK_TOKENS)
            now_s += times.seconds(len(step.frames) + len(step.prompts), 14)
            for row in step.frames:
                longest_s = max(longest_s, now_s - row.moved_s)
                row.made_frame(now_s)
        step_s = times.seconds(2, 14)
        assert all(row.num_frames > 5 for row in answers)
        assert longest_s <= WHOLE_WAIT_S + (len(answers) + 1) * step_s


class TestPlayback:
    def test_a_stream_is_due_every_80_ms_from_its_first_frame_on(self) -> None:
        row = newcomer()
        for now_s in (1.0, 1.01, 1.02):
            row.made_frame(now_s)
        assert row.due_s == pytest.approx(1.0 + 3 * FRAME_S)

    def test_after_a_gap_playback_begins_again(self) -> None:
        row = newcomer()
        row.made_frame(1.0)
        row.made_frame(2.0)
        assert row.due_s == pytest.approx(2.0 + FRAME_S)

    def test_a_whole_answer_is_due_some_time_after_its_last_frame(self) -> None:
        row = whole("answer")
        row.made_frame(1.0)
        assert row.due_s == pytest.approx(1.0 + WHOLE_FRAME_S)

    @pytest.mark.parametrize("speed", [0.25, 2.0])
    def test_a_frame_of_faster_speech_is_due_sooner(self, speed: float) -> None:
        row = Row("fast", 0.0, frame_s=FRAME_S / speed)
        for _ in range(3):
            row.made_frame(1.0)
        assert row.due_s == pytest.approx(1.0 + 3 * FRAME_S / speed)


class TestAdmission:
    def test_as_many_streams_are_admitted_as_one_step_makes_in_time(self) -> None:
        times = cpu_times()
        most = int((MAX_LOAD * FRAME_S - STEP_S) / (ROW_S + times.prompt_s))
        assert can_admit(streams(most - 1, FRAME_S), 0.0, times)
        assert not can_admit(streams(most, FRAME_S), 0.0, times)

    def test_one_is_admitted_beside_streams_that_end_before_their_audio_is_played(self) -> None:
        ahead = streams(40, 5.0)
        for row in ahead:
            row.frames_expected = 11
        assert can_admit(ahead, 0.0, cpu_times(), frames=50)
        for row in ahead:
            row.due_s = FRAME_S
        assert not can_admit(ahead, 0.0, cpu_times(), frames=50)

    def test_fewer_are_admitted_while_the_machine_is_slower_than_it_was(self) -> None:
        times, rows = cpu_times(), streams(16, FRAME_S)
        for _ in range(200):
            times.observe(17, 0, STEP_S + 17 * ROW_S)
        assert can_admit(rows, 0.0, times)
        for _ in range(10):
            times.observe(17, 0, 1.6 * (STEP_S + 17 * ROW_S))
        assert not can_admit(rows, 0.0, times)

    def test_less_is_reserved_for_lengths_that_vary_less(self) -> None:
        ahead = streams(40, 5.0)
        for row in ahead:
            row.frames_expected = 50
        assert can_admit(ahead, 0.0, cpu_times(), frames=50, spread=0.1)
        assert not can_admit(ahead, 0.0, cpu_times(), frames=50, spread=1.0)

    def test_a_lead_does_not_help_streams_without_an_end(self) -> None:
        assert not can_admit(streams(40, 5.0), 0.0, cpu_times())

    def test_whole_answers_count_for_their_share_of_frames(self) -> None:
        share = round(WHOLE_FRAME_S / FRAME_S)
        rows = [whole(f"{i}") for i in range(15 * share)]
        assert can_admit(rows, 0.0, cpu_times())
        assert not can_admit([*rows, *streams(8, FRAME_S)], 0.0, cpu_times())

    def test_speech_at_twice_the_tempo_counts_twice(self) -> None:
        times = cpu_times()
        most = int((MAX_LOAD * FRAME_S - STEP_S) / (ROW_S + times.prompt_s))
        assert can_admit(streams(most - 2, FRAME_S), 0.0, times, speed=2.0)
        assert not can_admit(streams(most - 1, FRAME_S), 0.0, times, speed=2.0)
        rows = streams(most // 2, FRAME_S)
        assert can_admit(rows, 0.0, times)
        for row in rows:
            row.frame_s /= 2
        assert not can_admit([*rows, *streams(1, FRAME_S)], 0.0, times)

    def test_prompts_that_come_with_the_frames_cost_too(self) -> None:
        times = cpu_times()
        rows = streams(15, FRAME_S)
        assert can_admit(rows, 0.0, times)
        for _ in range(200):
            times.observe(8, 64, STEP_S + 8 * ROW_S + 64 * TOKEN_S)
        assert not can_admit(rows, 0.0, times)

    def test_the_wait_grows_with_the_line_and_with_what_is_left_to_say(self) -> None:
        rows = streams(4, 1.0)
        for left, row in enumerate(rows):
            row.frames_expected = 10 + 25 * (1 + left)
        waits = [wait_s(rows, 0.0, cpu_times(), num_ahead) for num_ahead in range(6)]
        assert waits == sorted(waits)
        assert waits[0] == pytest.approx(WAIT_MARGIN * 25 * (STEP_S + 4 * ROW_S), rel=0.05)
        assert wait_s([], 0.0, cpu_times(), 3) == 0.0

    def test_the_wait_ends_when_speech_is_played_if_it_is_made_no_faster(self) -> None:
        slow = StepTimes()
        slow.observe(1, 0, FRAME_S)
        [row] = streams(1, 1.0)
        row.frames_expected = 10 + 25
        assert wait_s([row] * 4, 0.0, slow) == pytest.approx(WAIT_MARGIN * (1.0 + 25 * FRAME_S))
