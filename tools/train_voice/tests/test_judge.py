"""The judges of speech."""

import numpy as np
import pytest

import judge


@pytest.mark.parametrize(
    ("reference", "heard", "errors"),
    [
        ("It's 7 o'clock, okay?", "its seven o'clock ok", 1),
        ("one two three", "", 3),
        ("one two three", "zero one two three four", 2),
        ("the cat sat", "the bat sat", 1),
        ("four or five thousand a year, at seven thirty", "4 or 5,000 a year at 7 30", 0),
        ("our neighbourhood's favourite colours", "our neighborhood's favorite colors", 0),
    ],
)
def test_word_errors(reference, heard, errors):
    assert judge.word_errors(reference, heard) == (errors, len(judge.words(reference)))


@pytest.mark.parametrize("f0_hz", [95.0, 118.0, 195.0, 240.0])
def test_median_f0(f0_hz):
    time_s = np.arange(24000) / 24000
    voice = sum(np.sin(2 * np.pi * f0_hz * n * time_s) / n for n in range(1, 12)) * 0.1
    voice += 0.02 * np.random.default_rng(0).standard_normal(24000)
    assert judge.median_f0_hz(voice.astype(np.float32)) == pytest.approx(f0_hz, rel=0.02)
