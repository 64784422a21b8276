"""A long text is spoken in parts that are those of single requests, joined without a step."""

import numpy as np
import pytest
import torch

from checkpoints import TinyShape, build_tiny
from engine_testing import random_context, run
from vox_serve.ending import FADE_SAMPLES
from vox_serve.engine import Engine, Request
from vox_serve.loading import load_engine
from vox_serve.long_form import LongForm
from vox_serve.prompt import Segment
from vox_serve.sampling import SamplingParams

SENTENCES = ["Ada runs.", "Bob sits down.", "Cy is here!", "Did Di go?", "Ed left."]
TEXT = " ".join(SENTENCES)
SPLIT_CHARS = 15  # every sentence is a part
FRAME = 1920


@pytest.fixture(scope="module")
def engine(tmp_path_factory) -> Engine:
    tiny = build_tiny(TinyShape(max_positions=256), seed=12)
    return load_engine(str(tiny.write(tmp_path_factory.mktemp("checkpoint"))), dtype="float32")


@pytest.fixture
def long_form(engine) -> LongForm:
    engine.reset()
    return LongForm(engine, SPLIT_CHARS)


def request(text=TEXT, **fields) -> Request:
    return Request(text, 1, sampling=SamplingParams(seed=5), **{"max_frames": 8, **fields})


def run_parts(engine: Engine, counts: list[int], context=None) -> list[tuple]:
    """Speak the sentences one by one as requests of their own."""
    recent: list[Segment] = []
    spoken = []
    for number, count in enumerate(counts):
        sampling = SamplingParams(seed=5 + number)
        before = [*(context or ()), *recent] if context or recent else context
        part = Request(SENTENCES[number], 1, before, sampling, max_frames=count)
        spoken.append(run(engine, part)[part.id])
        recent.append(Segment(1, SENTENCES[number], spoken[-1][0]))
    return spoken


def script_ends(monkeypatch, engine: Engine, ends: dict[str, int]) -> None:
    """Make the model draw its stop frame after so many frames of a part."""
    finish = engine._finish_frame

    def finish_frame(live, codes, *rest):
        is_end = len(live.codes) == ends.get(live.request.text, -1)
        return finish(live, None if is_end else codes, *rest)

    monkeypatch.setattr(engine, "_finish_frame", finish_frame)


@pytest.mark.parametrize("with_context", [False, True])
def test_parts_are_single_requests_joined(engine, long_form, monkeypatch, with_context):
    counts = [3, 4, 1, 5, 2]
    context = random_context(TinyShape()) if with_context else None
    expected = run_parts(engine, counts, context)
    engine.reset()
    script_ends(monkeypatch, engine, dict(zip(SENTENCES, counts, strict=True)))
    wanted = request(context=context, max_frames=100)
    codes, audio, reason = run(long_form, wanted)[wanted.id]
    assert reason == "stop"
    assert torch.equal(codes, torch.cat([part[0] for part in expected]))
    joints = np.cumsum(counts)[:-1] * FRAME
    alone = torch.cat([part[1] for part in expected])
    touched = np.zeros(len(alone), bool)
    for joint in joints:
        touched[joint : joint + FADE_SAMPLES] = True
        assert abs(audio[joint] - audio[joint - 1]) < 0.02 * abs(alone[joint] - alone[joint - 1])
    assert torch.equal(audio[~touched], alone[~touched])
    assert not long_form._passages
    assert not long_form.has_work


def test_a_short_text_is_one_utterance(engine, long_form):
    short = request(SENTENCES[1])
    expected = run(engine, short)[short.id]
    found = run(long_form, short)[short.id]
    assert all(torch.equal(a, b) for a, b in zip(expected[:2], found[:2], strict=True))


def test_max_frames_holds_for_the_whole(engine, long_form, monkeypatch):
    script_ends(monkeypatch, engine, dict.fromkeys(SENTENCES, 3))
    wanted = request(max_frames=10)
    codes, _, reason = run(long_form, wanted)[wanted.id]
    assert (len(codes), reason) == (10, "length")
    exact = request(max_frames=9)
    codes, _, reason = run(long_form, exact)[exact.id]
    assert (len(codes), reason) == (9, "length")


def test_a_part_without_an_end_does_not_end_the_rest(engine, long_form, monkeypatch):
    monkeypatch.setattr(engine, "max_silence_s", 3.0)
    monkeypatch.setattr("vox_serve.long_form.frames_bound", lambda text: 4)
    script_ends(monkeypatch, engine, {SENTENCES[0]: 2, SENTENCES[2]: 1})
    wanted = request(max_frames=100)
    codes, _, reason = run(long_form, wanted)[wanted.id]
    assert len(codes) == 2 + 4 + 1 + 4 + 4
    assert reason == "length"


def test_an_empty_part_is_skipped(engine, long_form, monkeypatch):
    script_ends(monkeypatch, engine, {text: i % 2 for i, text in enumerate(SENTENCES)})
    wanted = request(max_frames=100)
    codes, audio, reason = run(long_form, wanted)[wanted.id]
    assert (len(codes), len(audio), reason) == (2, 2 * FRAME, "stop")


def test_earlier_parts_leave_the_context_when_it_is_full(engine, monkeypatch):
    """Half of them at once, so that the prefix stays the same for several parts."""
    engine.reset()
    sentences = [f"Sentence {i} is here." for i in range(40)]
    long_form = LongForm(engine, 30, max_recent_positions=100)
    script_ends(monkeypatch, engine, dict.fromkeys(sentences, 6))
    contexts = []
    prepare = engine.prepare

    def spy(part):
        contexts.append([segment.text for segment in part.context or ()])
        return prepare(part)

    monkeypatch.setattr(engine, "prepare", spy)
    wanted = request(" ".join(sentences), max_frames=1000)
    codes, _, reason = run(long_form, wanted)[wanted.id]
    assert (len(codes), reason) == (240, "stop")
    assert len(contexts) == 40
    changes = 0
    for number, context in enumerate(contexts[1:], 1):
        assert context[-1] == sentences[number - 1]
        assert context == sentences[number - len(context) : number]
        assert len(context) <= 4
        changes += context[:1] != contexts[number - 1][:1]
    assert changes < 20
    assert engine.num_found_positions > 0.4 * engine.num_prompt_positions


def test_long_texts_and_others_share_a_batch(engine, monkeypatch):
    script_ends(monkeypatch, engine, dict.fromkeys(SENTENCES, 3))
    long_form = LongForm(engine, SPLIT_CHARS)
    requests = [
        Request(TEXT, i % 2, sampling=SamplingParams(seed=i), max_frames=50, id=str(i))
        for i in range(4)
    ] + [Request("Short.", 0, sampling=SamplingParams(seed=9), max_frames=5, id="4")]
    engine.reset()
    alone = [run(long_form, wanted)[wanted.id] for wanted in requests]
    engine.reset()
    together = run(long_form, *requests)
    for i, (codes, audio, reason) in enumerate(alone):
        assert torch.equal(together[str(i)][0], codes)
        assert torch.equal(together[str(i)][1], audio)
        assert together[str(i)][2] == reason


@pytest.mark.parametrize("num_steps", [1, 4, 9])
def test_abort_and_reset_drop_the_rest(engine, long_form, monkeypatch, num_steps):
    script_ends(monkeypatch, engine, dict.fromkeys(SENTENCES, 3))
    wanted = request(max_frames=100)
    for end in (lambda: long_form.abort(wanted.id), long_form.reset):
        long_form.add(wanted)
        for _ in range(num_steps):
            long_form.step()
        end()
        assert not long_form.has_work
        assert not long_form._passages
        assert long_form.step() == []


def test_a_long_part_takes_the_place_of_earlier_ones(engine, long_form, monkeypatch):
    """Emoji and rare scripts have several tokens for a character."""
    script_ends(monkeypatch, engine, dict.fromkeys(SENTENCES, 3))
    tokens = engine.prompts.tokens

    def many(segment):
        found = tokens(segment)
        return found + found[1:2] * 210 if segment.text == SENTENCES[3] else found

    monkeypatch.setattr(engine.prompts, "tokens", many)
    wanted = request(max_frames=100)
    codes, _, reason = run(long_form, wanted)[wanted.id]
    assert (len(codes), reason) == (15, "stop")


def test_speech_goes_on_without_a_thread_for_the_next_part(engine, long_form, monkeypatch):
    def fail(*_):
        raise RuntimeError("can't start new thread")

    script_ends(monkeypatch, engine, dict.fromkeys(SENTENCES, 3))
    monkeypatch.setattr(long_form._tokenizing, "submit", fail)
    wanted = request(max_frames=100)
    codes, _, reason = run(long_form, wanted)[wanted.id]
    assert (len(codes), reason) == (15, "stop")


def test_a_text_that_cannot_be_tokenized_ends_with_an_error(engine, long_form, monkeypatch):
    script_ends(monkeypatch, engine, dict.fromkeys(SENTENCES, 3))
    tokens = engine.prompts.tokens

    def fails(segment):
        if segment.text == SENTENCES[2]:
            raise ValueError("no tokens")
        return tokens(segment)

    monkeypatch.setattr(engine.prompts, "tokens", fails)
    wanted = request(max_frames=100)
    long_form.add(wanted)
    outputs = []
    while long_form.has_work:
        outputs += long_form.step()
    assert outputs[-1][3:7] == ("error", "no tokens", 1, True)
    assert len(outputs) == 7


def test_a_part_without_room_ends_the_speech_at_the_context(engine, long_form, monkeypatch):
    """A long context leaves room for the first part, but not for a longer one."""
    script_ends(monkeypatch, engine, dict.fromkeys(SENTENCES, 3))
    tokens = engine.prompts.tokens

    def many(segment):
        found = tokens(segment)
        return found + found[1:2] * 250 if segment.text == SENTENCES[2] else found

    monkeypatch.setattr(engine.prompts, "tokens", many)
    long_form.add(request(max_frames=100))
    outputs = []
    while long_form.has_work:
        outputs += long_form.step()
    assert outputs[-1][3:7] == ("context", outputs[-1].error, 1, True)
    assert "the prompt takes" in outputs[-1].error
    assert [output.codes is None for output in outputs] == [False] * 6 + [True]
    assert not long_form._passages


@pytest.mark.slow
def test_a_book_takes_no_more_memory_than_a_page(engine, monkeypatch):
    """The parts that stay in the context are bounded, whatever the number of parts."""
    text = " ".join(f"Line {i} ends." for i in range(300))
    long_form = LongForm(engine, 20)
    monkeypatch.setattr(engine, "max_silence_s", 3.0)
    monkeypatch.setattr("vox_serve.long_form.frames_bound", lambda text: 2)
    long_form.add(request(text, max_frames=None))
    frames = 0
    while long_form.has_work:
        frames += sum(output.codes is not None for output in long_form.step())
        for passage in long_form._passages.values():
            assert sum(length for _, length in passage.recent) <= passage.max_recent + 20
    assert frames == 600


def test_one_sequence_in_the_cache_is_enough_for_a_long_text(engine, tmp_path):
    tiny = build_tiny(TinyShape(max_positions=256), seed=12)
    small = load_engine(
        str(tiny.write(tmp_path)), dtype="float32", max_batch_size=1, keeps_one=True
    )
    found, codes = [], []
    for some in (engine, small):
        some.reset()
        wanted = request(" ".join([TEXT] * 3), max_frames=1000)
        before = some.num_found_positions
        codes.append(run(LongForm(some, SPLIT_CHARS), wanted)[wanted.id][0])
        found.append(some.num_found_positions - before)
    torch.testing.assert_close(codes[1], codes[0], rtol=0, atol=0)
    assert found[0] == found[1] > 256
    pages = small.cache_counts()["pages_cached"]
    assert pages <= 256 // 16 < engine.cache_counts()["pages_cached"]
