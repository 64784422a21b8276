"""Conversations with a real engine: a turn's codes are those of its context given explicitly."""

import json
import threading
from contextlib import contextmanager

import pytest
import torch
from fastapi.testclient import TestClient

from checkpoints import TinyShape, build_tiny
from engine_testing import random_context, run
from fake_engine import TIMEOUT_S
from vox_serve.api import create_app
from vox_serve.config import Config
from vox_serve.engine import Engine, Request
from vox_serve.kv_cache import PAGE_SIZE
from vox_serve.loading import load_engine
from vox_serve.long_form import LongForm
from vox_serve.prompt import Segment
from vox_serve.runner import Runner
from vox_serve.sampling import SamplingParams

NUM_FRAMES = 12
SPLIT_CHARS = 15


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = build_tiny(TinyShape(), seed=31).write(tmp_path_factory.mktemp("checkpoint"))
    torch.manual_seed(3)
    segments = [segment_json(s) for s in random_context(TinyShape())]
    (folder / "segments.json").write_text(json.dumps(segments))
    return folder


@pytest.fixture(scope="module")
def alone(folder) -> Engine:
    """Computes expected codes; it has no cache of what was spoken."""
    return load_engine(str(folder), prefix_cache_bytes=0)


@contextmanager
def serve(folder):
    config = Config(
        model=str(folder), max_frames=NUM_FRAMES, max_frames_limit=100, split_chars=SPLIT_CHARS
    )
    engine = LongForm(load_engine(str(folder), max_silence_s=1000.0), SPLIT_CHARS)
    with TestClient(create_app(Runner.for_config(engine, config), config, {})) as client:
        yield client


@pytest.fixture(scope="module")
def client(folder):
    with serve(folder) as client:
        yield client


def segment_json(segment: Segment) -> dict:
    codes = segment.codes.tolist()
    return {"speaker": segment.speaker, "text": segment.text, "codes": codes}


def kept(client, key: str) -> list[Segment]:
    """A conversation's turns as context."""
    turns = client.get(f"/v1/conversations/{key}", params={"codes": 1}).json()["turns"]
    return [Segment(t["speaker"], t["text"], torch.tensor(t["codes"])) for t in turns]


def expected(alone: Engine, text: str, context, seed: int, speaker=0, max_frames=NUM_FRAMES):
    request = Request(text, speaker, context or None, SamplingParams(seed=seed), max_frames)
    return run(alone, request)[request.id][0]


def test_a_turns_codes_are_those_of_its_context_given_explicitly(client, alone):
    first = [segment_json(s) for s in random_context(TinyShape())]
    for turn in first:
        assert client.post("/v1/conversations/a/turns", json=turn).status_code == 201
    context = kept(client, "a")
    assert [segment_json(s) for s in context] == first
    for number in range(4):
        text, speaker = f"Turn {number}.", number % 2
        body = {"text": text, "speaker": speaker, "seed": number}
        whole = client.post("/generate", json={**body, "conversation": "a"})
        assert whole.status_code == 200
        codes = expected(alone, text, context, number, speaker)
        explicit = client.post("/generate", json={**body, "context": [*map(segment_json, context)]})
        assert explicit.content == whole.content
        context = kept(client, "a")
        assert torch.equal(context[-1].codes, codes)
        assert (context[-1].speaker, context[-1].text) == (speaker, text)


def test_a_turn_computes_little_more_than_its_own_text(client):
    engine = client.app.state.conversations._engine.engine
    for number in range(6):
        body = {"text": f"Turn {number}.", "seed": number, "conversation": "e"}
        missing = engine.num_found_positions - engine.num_prompt_positions
        client.post("/generate", json=body)
        missing += engine.num_prompt_positions - engine.num_found_positions
        num_tokens = len(engine.prompts.tokens(Segment(0, body["text"])))
        # The end of the last turn: its last frame, the frame of zeros, and less than a page.
        assert missing <= num_tokens + 2 + PAGE_SIZE


@pytest.fixture
def watched(folder, monkeypatch):
    """A client, and a semaphore that counts the contexts that were prefilled while idle."""
    with serve(folder) as client:
        idle_prefill = client.app.state.conversations._engine.idle_prefill
        done, original = threading.Semaphore(0), idle_prefill.step

        def step() -> None:
            had_work = idle_prefill.has_work
            original()
            if had_work and not idle_prefill.has_work:
                done.release()

        monkeypatch.setattr(idle_prefill, "step", step)
        yield client, done


def num_computed(client, body: dict) -> int:
    """Positions of a turn's prompt that were computed when it came."""
    engine = client.app.state.conversations._engine.engine
    before = engine.num_found_positions - engine.num_prompt_positions
    assert client.post("/generate", json=body).status_code == 200
    return before + engine.num_prompt_positions - engine.num_found_positions


def num_tokens(client, text: str) -> int:
    return len(client.app.state.conversations._engine.prompts.tokens(Segment(0, text)))


@pytest.mark.slow
def test_the_next_context_is_prefilled_while_nobody_waits(watched):
    """256 positions: the context begins with another turn now and then, and nobody notices."""
    client, done = watched
    for number in range(24):
        body = {"text": f"Turn {number:02}.", "seed": number, "conversation": "a"}
        assert num_computed(client, body) == num_tokens(client, body["text"])
        assert done.acquire(timeout=TIMEOUT_S)
    assert client.get("/v1/conversations/a").json()["forgotten_turns"] > 0


def test_turns_of_others_and_what_was_heard_are_prefilled_too(watched):
    client, done = watched
    num_computed(client, {"text": "One two.", "seed": 1, "conversation": "b"})
    assert done.acquire(timeout=TIMEOUT_S)
    client.post("/v1/conversations/b/interrupt", json={"played_ms": 400})
    assert done.acquire(timeout=TIMEOUT_S)
    body = {"text": "Three.", "seed": 2, "conversation": "b"}
    assert num_computed(client, body) == num_tokens(client, body["text"])
    assert done.acquire(timeout=TIMEOUT_S)
    turn = segment_json(random_context(TinyShape())[0])
    assert client.post("/v1/conversations/b/turns", json=turn).status_code == 201
    assert done.acquire(timeout=TIMEOUT_S)
    assert num_computed(client, body) == num_tokens(client, body["text"])


def test_the_turn_after_an_interruption_has_what_was_heard(client, alone):
    client.post("/generate", json={"text": "One two.", "seed": 1, "conversation": "b"})
    answer = client.post("/v1/conversations/b/interrupt", json={"played_ms": 400})
    assert answer.json()["heard_s"] == 0.4
    heard = [Segment(0, "One two.", expected(alone, "One two.", None, 1)[:5])]
    heard[0] = Segment(0, answer.json()["text"], heard[0].codes)
    client.post("/generate", json={"text": "Next.", "seed": 2, "conversation": "b"})
    assert torch.equal(kept(client, "b")[-1].codes, expected(alone, "Next.", heard, 2))


def test_the_parts_of_a_long_text_are_turns(client, alone, monkeypatch):
    monkeypatch.setattr("vox_serve.long_form.frames_bound", lambda text: 6)
    text = "Ada runs. Bob sits down. Cy is here!"
    body = {"text": text, "seed": 7, "max_frames": 3 * NUM_FRAMES, "conversation": "c"}
    assert client.post("/generate", json=body).status_code == 200
    spoken = kept(client, "c")
    assert [s.text for s in spoken] == ["Ada runs.", "Bob sits down.", "Cy is here!"]
    assert torch.equal(spoken[2].codes, expected(alone, spoken[2].text, spoken[:2], 9, 0, 6))
    client.post("/generate", json={"text": "Next.", "seed": 8, "conversation": "c"})
    context = kept(client, "c")[:-1]
    assert torch.equal(kept(client, "c")[-1].codes, expected(alone, "Next.", context, 8))


@pytest.mark.slow
def test_a_long_conversation_goes_on(client, alone):
    """256 positions: the first turns leave the context, and no turn is cut for want of room."""
    for number in range(30):
        body = {"text": f"Turn {number}.", "seed": number, "conversation": "d"}
        answer = client.post("/generate", json=body)
        assert answer.headers["x-finish-reason"] in ("stop", "length")
    shown = client.get("/v1/conversations/d").json()
    assert 0 < shown["forgotten_turns"] < 30
    assert len(shown["turns"]) + shown["forgotten_turns"] == 30
