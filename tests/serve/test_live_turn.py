"""The time for which a turn of the WebSocket keeps its place without text."""

import asyncio
from types import SimpleNamespace

import pytest

from fake_engine import FakeEngine
from vox_serve import engine
from vox_serve.formats import Output
from vox_serve.growing_text import GrowingText
from vox_serve.http_io import BodyMemory
from vox_serve.live_turn import Turn
from vox_serve.long_form import LongForm


@pytest.fixture
def turn() -> Turn:
    text = GrowingText(1000, 100, 0)
    return Turn(1, None, Output.of("pcm"), text, BodyMemory(2**20).hold("somebody"))


def write(turn: Turn, text: str) -> None:
    asyncio.run(turn.write(text))
    turn.flush()


def test_only_the_time_after_the_last_frame_is_a_wait(turn):
    write(turn, "Hello there.")
    turn.count_wait(100.0)
    turn.feed.count_spoken(1, 118.0)
    turn.count_wait(119.0)  # a message without a sentence
    assert turn.waited_s == 1.0
    turn.count_wait(121.0)
    assert turn.waited_s == 3.0


def test_speech_between_two_waits_is_none(turn):
    write(turn, "Hello there.")
    turn.feed.count_spoken(1, 10.0)
    turn.count_wait(12.0)
    write(turn, "How are you?")
    turn.count_wait(15.0)
    turn.feed.count_spoken(2, 30.0)
    turn.count_wait(30.5)
    assert turn.waited_s == 2.5


def test_no_wait_before_the_first_sentence_nor_after_the_end(turn):
    turn.count_wait(5.0)
    write(turn, "Hello there.")
    turn.count_wait(50.0)
    turn.end()
    turn.feed.count_spoken(1, 60.0)
    turn.count_wait(90.0)
    assert turn.waited_s == 0.0


def test_the_engine_tells_when_the_text_was_spoken(turn, monkeypatch):
    monkeypatch.setattr("vox_serve.long_form.time", SimpleNamespace(monotonic=lambda: 1234.0))
    write(turn, "Hello there.")
    long_form = LongForm(FakeEngine(), 24)
    long_form.add(engine.Request(turn.feed[0], feed=turn.feed))
    while long_form.has_work:
        assert not turn.is_starved
        long_form.step()
    assert turn.is_starved
    assert turn.feed.spoken_at_s == 1234.0
