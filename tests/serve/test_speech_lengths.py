"""The length of speech is learnt from speech that has ended."""

import math
import random

import pytest

from checkpoints import build_tiny
from engine_testing import GREEDY, run_one
from vox_serve.engine import Request
from vox_serve.loading import load_engine
from vox_serve.speech_lengths import MOST_RATIO, START_SPREAD, SpeechLengths
from vox_serve.text_bound import frames_expected


def learnt(*speeches: tuple[float, int]) -> SpeechLengths:
    lengths = SpeechLengths()
    for guess, frames in speeches:
        lengths.ended(guess, frames)
    return lengths


def test_a_guess_holds_until_something_was_learnt():
    lengths = SpeechLengths()
    assert lengths.expected(100.0) == 100.0
    assert lengths.expected(math.inf) == math.inf
    assert lengths.spread == START_SPREAD


def test_one_speech_changes_little_and_many_change_all():
    assert 80 < learnt((100.0, 50)).expected(100.0) < 100
    lengths = learnt(*[(100.0, 50)] * 100)
    assert lengths.expected(100.0) == pytest.approx(50, rel=0.05)
    assert lengths.expected(120.0) == pytest.approx(60, rel=0.05)


def test_texts_of_other_lengths_have_a_ratio_of_their_own():
    lengths = learnt(*[(60.0, 36), (400.0, 130)] * 60)
    assert lengths.expected(60.0) == pytest.approx(36, rel=0.05)
    assert lengths.expected(400.0) == pytest.approx(130, rel=0.05)
    assert 0.33 < lengths.expected(2000.0) / 2000 < 0.6  # never seen: the ratio of all


def test_the_spread_is_that_of_lengths_around_what_was_expected():
    draw = random.Random(0)
    for spread in (0.1, 0.4):
        lengths = SpeechLengths()
        for _ in range(600):
            lengths.ended(200.0, round(160 * draw.normalvariate(1.0, spread)))
        assert lengths.spread == pytest.approx(spread, rel=0.25)


def test_speech_that_was_cut_counts_only_if_it_was_too_long_already():
    lengths = SpeechLengths()
    lengths.ended(100.0, 30, was_cut=True)
    assert lengths.expected(100.0) == 100.0
    lengths.ended(100.0, 200, was_cut=True)
    assert lengths.expected(100.0) > 100.0


def test_a_single_speech_without_an_end_does_no_harm():
    lengths = learnt(*[(100.0, 100)] * 30)
    lengths.ended(100.0, 10**6)
    assert lengths.expected(100.0) < 100 * (1 + MOST_RATIO / 30)
    lengths.ended(math.inf, 5)
    lengths.ended(0.0, 5)
    assert lengths.spread < 1.0


def test_an_engine_learns_from_speech_that_ends_by_itself(tmp_path):
    engine = load_engine(str(build_tiny(stop_frame=3).write(tmp_path)))
    text = "Stop."
    guess = frames_expected(text)
    run_one(engine, text=text, sampling=GREEDY, max_frames=2)
    assert engine.lengths.expected(guess) == guess
    run_one(engine, text=text, sampling=GREEDY, max_frames=10)
    assert engine.lengths.expected(guess) < guess
    row = engine.add(Request(text))
    assert row.frames_expected == engine.lengths.expected(guess)
