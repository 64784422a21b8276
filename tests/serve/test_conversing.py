"""Conversations with a real engine: a turn's codes are those of its context given explicitly."""

import json
import threading
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
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
from vox_serve.voice_file import Voice

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


class Watched:
    """A client. `done` counts the contexts that left the line of those to prefill while idle; none
    is prefilled while `may_prefill` is not set."""

    def __init__(self, client, monkeypatch) -> None:
        self.client = client
        self.done = threading.Semaphore(0)
        self.may_prefill = threading.Event()
        self.may_prefill.set()
        self.idle_prefill = client.app.state.conversations._engine.idle_prefill
        original = self.idle_prefill.step

        def step() -> None:
            if self.idle_prefill.has_work:
                assert self.may_prefill.wait(TIMEOUT_S)
                original()
                if not self.idle_prefill.has_work:
                    self.done.release()

        monkeypatch.setattr(self.idle_prefill, "step", step)

    def wait(self) -> None:
        assert self.done.acquire(timeout=TIMEOUT_S)


@pytest.fixture
def watched(folder, monkeypatch):
    with serve(folder) as client:
        yield Watched(client, monkeypatch)


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
    client = watched.client
    for number in range(24):
        body = {"text": f"Turn {number:02}.", "seed": number, "conversation": "a"}
        assert num_computed(client, body) == num_tokens(client, body["text"])
        watched.wait()
    assert client.get("/v1/conversations/a").json()["forgotten_turns"] > 0


def test_turns_of_others_and_what_was_heard_are_prefilled_too(watched):
    client = watched.client
    num_computed(client, {"text": "One two.", "seed": 1, "conversation": "b"})
    watched.wait()
    client.post("/v1/conversations/b/interrupt", json={"played_ms": 400})
    watched.wait()
    body = {"text": "Three.", "seed": 2, "conversation": "b"}
    assert num_computed(client, body) == num_tokens(client, body["text"])
    watched.wait()
    turn = segment_json(random_context(TinyShape())[0])
    assert client.post("/v1/conversations/b/turns", json=turn).status_code == 201
    watched.wait()
    assert num_computed(client, body) == num_tokens(client, body["text"])


def test_the_voice_of_a_conversation_is_prefilled_with_its_turns(watched):
    client = watched.client
    store = client.app.state.voices.store
    segments = tuple(replace(segment, speaker=1) for segment in random_context(TinyShape()))
    preview, levels = np.zeros(1920, np.int16), (None,) * len(segments)
    store.add(Voice("ada", 1, segments, store.sizes, 0, 0.08, levels, preview, 24_000))
    body = {"text": "One two.", "seed": 1, "conversation": "c", "voice": "ada"}
    first = num_computed(client, body)
    assert first > num_tokens(client, body["text"])
    watched.wait()
    assert num_computed(client, body) == num_tokens(client, body["text"])


def test_a_deleted_conversation_is_not_prefilled(watched):
    client = watched.client
    watched.may_prefill.clear()
    assert client.post("/generate", json={"text": "One.", "conversation": "d"}).status_code == 200
    assert client.delete("/v1/conversations/d").status_code == 200
    watched.may_prefill.set()
    watched.wait()
    assert watched.idle_prefill.num_positions == 0


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
