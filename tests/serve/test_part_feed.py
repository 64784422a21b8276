"""A text that is written while it is spoken has the samples of the same parts in one request."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from checkpoints import TinyShape, build_tiny
from engine_testing import random_context, run
from vox_serve.ending import delivered_audio
from vox_serve.engine import Engine, Request
from vox_serve.loading import load_engine
from vox_serve.long_form import LongForm
from vox_serve.part_feed import PartFeed
from vox_serve.sampling import SamplingParams

SENTENCES = ["Ada runs.", "Bob sits down.", "Cy is here!", "Did Di go?", "Ed left."]


@pytest.fixture(scope="module")
def engine(tmp_path_factory) -> Engine:
    tiny = build_tiny(TinyShape(max_positions=256), seed=12)
    return load_engine(str(tiny.write(tmp_path_factory.mktemp("checkpoint"))), dtype="float32")


@pytest.fixture
def long_form(engine) -> LongForm:
    engine.reset()
    return LongForm(engine, 15)  # every sentence is a part


def script_ends(monkeypatch, engine: Engine, ends: dict[str, int]) -> None:
    """Make the model draw its stop frame after so many frames of a part."""
    finish = engine._finish_frame

    def finish_frame(live, codes, *rest):
        is_end = len(live.codes) == ends.get(live.request.text, -1)
        return finish(live, None if is_end else codes, *rest)

    monkeypatch.setattr(engine, "_finish_frame", finish_frame)


def whole(**fields) -> Request:
    return Request(" ".join(SENTENCES), 1, sampling=SamplingParams(seed=5), **fields)


def speak(long_form: LongForm, request: Request, before_step=lambda: None) -> tuple:
    """Codes, samples as they are delivered, finish reason, and the ends of parts."""
    long_form.add(request)
    codes, audio, ends, reason = [], [], [], None
    for _ in range(1000):
        before_step()
        if not long_form.has_work:
            if reason:
                break
            assert request.feed.is_starved
            continue
        for output in long_form.step():
            if output.codes is not None:
                codes.append(output.codes)
                audio.append(delivered_audio(output))
            if output.part_reason:
                ends.append((output.part, output.part_reason, len(codes)))
            reason = output.finish_reason or reason
    assert not long_form._passages
    assert not long_form._starved
    return torch.stack(codes), np.concatenate(audio), reason, ends


def speak_fed(long_form: LongForm, request: Request, source: random.Random) -> tuple:
    """Speak the sentences, each of which is appended at a random step."""
    feed = PartFeed(SENTENCES[0])
    rest = SENTENCES[1:]

    def write() -> None:
        if source.random() > source.choice([0.05, 0.3, 1]) or not feed.is_open:
            return
        if rest:
            feed.append(rest.pop(0))
        else:
            feed.close()

    return speak(long_form, replace(request, text=SENTENCES[0], feed=feed), write)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("case", ["stops", "cuts", "last is cut", "limit", "empty parts"])
def test_samples_do_not_depend_on_when_text_comes(engine, long_form, monkeypatch, case, seed):
    monkeypatch.setattr(engine, "max_silence_s", 3.0)
    monkeypatch.setattr("vox_serve.long_form.frames_bound", lambda text: 6)
    ends = {
        "stops": dict(zip(SENTENCES, [3, 4, 1, 5, 2], strict=True)),
        "cuts": {SENTENCES[0]: 2, SENTENCES[2]: 1},
        "last is cut": dict.fromkeys(SENTENCES[:4], 2),
        "limit": dict.fromkeys(SENTENCES, 5),
        "empty parts": dict(zip(SENTENCES, [0, 2, 0, 3, 0], strict=True)),
    }[case]
    script_ends(monkeypatch, engine, ends)
    context = random_context(TinyShape()) if seed % 2 else None
    request = whole(context=context, max_frames=17 if case == "limit" else 100)
    codes, audio, reason, _ = speak(long_form, request)
    engine.reset()
    fed = speak_fed(long_form, request, random.Random(seed))
    assert torch.equal(fed[0], codes)
    assert np.array_equal(fed[1], audio)
    assert fed[2] == reason == {"stops": "stop", "empty parts": "stop"}.get(case, "length")
    parts = [part for part, *_ in fed[3]]
    assert parts == list(range(4 if case == "limit" else 5))
    assert [reason for _, reason, _ in fed[3]] == [
        "length" if ends.get(text, 6) > 5 or (case, n) == ("limit", 3) else "stop"
        for n, text in enumerate(SENTENCES[: len(parts)])
    ]
    assert [count for *_, count in fed[3]] == sorted(count for *_, count in fed[3])


def test_each_part_is_counted_once(long_form, monkeypatch):
    """A turn may have thousands of parts, and the engine's thread counts them."""
    monkeypatch.setattr("vox_serve.long_form.frames_bound", lambda text: 2)
    monkeypatch.setattr(long_form.engine, "max_silence_s", 3.0)
    counted = []

    def expected(text: str) -> int:
        counted.append(text)
        return 10

    monkeypatch.setattr("vox_serve.long_form.frames_expected", expected)
    speak_fed(long_form, whole(max_frames=100), random.Random(1))
    assert counted == SENTENCES


def test_a_closed_feed_of_one_part_is_a_single_request(engine, long_form):
    single = Request(SENTENCES[1], 1, sampling=SamplingParams(seed=5), max_frames=8)
    expected = run(long_form, single)[single.id]
    feed = PartFeed(SENTENCES[1])
    feed.close()
    codes, audio, reason, ends = speak(long_form, replace(single, feed=feed))
    assert torch.equal(codes, expected[0])
    assert np.array_equal(audio[:-240], expected[1].numpy()[:-240])
    assert (reason, ends) == (expected[2], [(0, "length", 8)])


def test_an_abort_leaves_nothing_while_text_is_awaited(engine, long_form, monkeypatch):
    script_ends(monkeypatch, engine, {SENTENCES[0]: 2})
    feed = PartFeed(SENTENCES[0])
    request = replace(whole(max_frames=100), text=SENTENCES[0], feed=feed)
    long_form.add(request)
    while long_form.has_work:
        long_form.step()
    assert feed.is_starved
    assert len(long_form.rows) == 1
    assert long_form.rows[0].frames_expected > 60
    long_form.abort(request.id)
    assert not long_form.rows
    feed.append(SENTENCES[1])
    assert not long_form.has_work
