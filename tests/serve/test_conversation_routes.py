"""Conversations over HTTP, and a request's own context: what the engine gets, and what is kept."""

import base64
import http.client
import io
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import soundfile
import torch
from fastapi.testclient import TestClient

from fake_engine import (
    CODEBOOK_SIZE,
    ENDLESS,
    TIMEOUT_S,
    FakeEngine,
    expected_pcm,
    fake_codes,
)
from http_testing import SENDERS, assert_refused
from live_server import LiveServer, wait_until
from vox_serve.api import create_app
from vox_serve.config import Config
from vox_serve.conversation_line import MAX_WAITING
from vox_serve.runner import Runner

PATH = "/v1/conversations"
CODES = [[1, 2, 3, 4]] * 3


def serve(engine: FakeEngine, **settings) -> TestClient:
    config = Config(**settings)
    app = create_app(Runner.for_config(engine, config), config, {})
    return TestClient(app, raise_server_exceptions=False)


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def client(engine):
    with serve(engine) as client:
        yield client


def wav(level: float = 0.5, seconds: float = 0.8) -> str:
    t = np.arange(int(seconds * 24_000)) / 24_000
    file = io.BytesIO()
    soundfile.write(file, level * np.sin(2 * np.pi * 440 * t), 24_000, format="WAV")
    return base64.b64encode(file.getvalue()).decode()


def say(client, text: str, key: str | None = "c", **fields):
    return client.post("/generate", json={"text": text, "conversation": key, **fields})


def turns(client, key: str = "c", **params) -> list[dict]:
    return client.get(f"{PATH}/{key}", params=params).json()["turns"]


def last_context(engine) -> list[tuple]:
    return [(s.speaker, s.text) for s in engine.requests[-1].context or ()]


def segment(text="Hi.", **speech) -> dict:
    return {"speaker": 1, "text": text, **(speech or {"codes": CODES})}


def test_each_turn_has_the_earlier_ones_as_context(client, engine):
    for number, text in enumerate(["One.", "Two.", "Three."]):
        answer = say(client, text, speaker=number % 2)
        assert answer.content[44:] == expected_pcm(text, 3)
    assert last_context(engine) == [(0, "One."), (1, "Two.")]
    codes = engine.requests[-1].context[0].codes
    assert codes.dtype == torch.int64
    assert torch.equal(codes, torch.stack([fake_codes("One.", i) for i in range(3)]))
    assert turns(client)[0] == {"speaker": 0, "text": "One.", "seconds": 0.24, "generated": True}
    assert turns(client, codes=1)[2]["codes"][0] == fake_codes("Three.", 0).tolist()
    say(client, "Elsewhere.", "d")
    assert last_context(engine) == []


def test_what_the_user_said_is_a_turn(client, engine):
    answer = client.post(f"{PATH}/c/turns", json=segment("Question?", audio=wav()))
    assert answer.status_code == 201, answer.text
    assert answer.json() == {
        "speaker": 1, "text": "Question?", "seconds": 0.88, "generated": False,
    }  # fmt: skip
    assert client.post(f"{PATH}/c/turns", json=segment("More.")).status_code == 201
    say(client, "Answer.")
    assert last_context(engine) == [(1, "Question?"), (1, "More.")]
    audio, codes = (s.codes for s in engine.requests[-1].context)
    assert audio[3].tolist() == [int(0.5 * 2 / np.pi * CODEBOOK_SIZE)] * 4
    assert codes.tolist() == CODES
    assert [t["generated"] for t in turns(client)] == [False, False, True]


def test_a_turn_as_a_form(client, engine):
    audio = base64.b64decode(wav())
    parts = [("speaker", (None, "5")), ("text", (None, "Wörds?")), ("audio", ("a.wav", audio))]
    assert client.post(f"{PATH}/c/turns", files=parts).status_code == 201
    client.post(f"{PATH}/d/turns", json={"speaker": 5, "text": "Wörds?", "audio": wav()})
    assert turns(client, "c", codes=1) == turns(client, "d", codes=1)
    path = f"{PATH}/e/turns"
    assert_refused(client.post(path, files=parts * 2), 400, "files")
    assert_refused(client.post(path, files=[*parts, parts[0]]), 422, "more than once")
    for i, says in enumerate(["speaker", "text", "audio"]):
        assert_refused(client.post(path, files=[*parts[:i], *parts[i + 1 :]]), 422, says)
    parts[0] = ("speaker", (None, "9" * 5000))
    assert_refused(client.post(path, files=parts), 422, "speaker")
    assert_refused(client.get(f"{PATH}/e"), 404)


def test_a_conversation_has_a_voice(client, engine):
    files = [("name", (None, "alice")), ("speaker", (None, "7")), ("transcript", (None, "Hear."))]
    files.append(("audio", ("a.wav", base64.b64decode(wav()))))
    assert client.post("/v1/audio/voices", files=files).status_code == 201
    key = client.post(PATH, json={"voice": "alice"}).json()["id"]
    for _ in range(2):
        assert say(client, "One.", key).status_code == 200
        assert engine.requests[-1].speaker == 7
    assert last_context(engine) == [(7, "Hear."), (7, "One.")]
    assert say(client, "One.", key, voice="alice").status_code == 200
    assert_refused(say(client, "One.", key, voice="1"), 422, "has voice alice")
    assert_refused(say(client, "One.", key, speaker=1), 422, "speaker 7")
    assert say(client, "One.", "c", voice="1").status_code == 200
    assert client.get(f"{PATH}/c").json()["voice"] == "1"
    say(client, "Two.", "c")
    assert engine.requests[-1].speaker == 1
    assert_refused(client.post(PATH, json={"voice": "bob"}), 404, "bob")
    assert_refused(say(client, "One.", "e", voice="bob"), 404, "bob")
    assert_refused(client.get(f"{PATH}/e"), 404)


def test_conversations_are_begun_shown_and_deleted(client):
    answer = client.post(PATH)
    assert answer.status_code == 201
    key = answer.json()["id"]
    assert answer.json() == {"id": key, "object": "conversation", "voice": None}
    shown = client.get(f"{PATH}/{key}").json()
    assert (shown["turns"], shown["speaking"], shown["forgotten_turns"]) == ([], False, 0)
    assert client.post(PATH, json={"id": "mine"}).json()["id"] == "mine"
    assert_refused(client.post(PATH, json={"id": "mine"}), 409, "mine")
    assert client.delete(f"{PATH}/mine").json()["deleted"] is True
    for send in (client.get, client.delete):
        assert_refused(send(f"{PATH}/mine"), 404, "mine")


def test_old_turns_leave_the_context_and_are_forgotten(client, engine):
    for i in range(40):
        say(client, f"This is number {i:2}.")
    kept = last_context(engine)
    assert 8 < len(kept) < 25
    assert kept[-1] == (0, "This is number 38.")
    shown = client.get(f"{PATH}/c").json()
    assert shown["forgotten_turns"] + len(shown["turns"]) == 40
    assert shown["forgotten_turns"] > 10
    positions = sum(len(s.text) + len(s.codes) + 1 for s in engine.requests[-1].context)
    assert positions <= 512 - len("This is number 39.") - 3


def test_a_model_of_single_utterances_gets_no_context(client, engine):
    engine.follows_context = False
    say(client, "One.")
    say(client, "Two.")
    assert engine.requests[-1].context is None
    assert [t["text"] for t in turns(client)] == ["One.", "Two."]


@SENDERS
def test_a_requests_own_context(send, client, engine):
    context = [segment("Hi.", audio=wav()), segment("Ho.")]
    values = {"text": "Now.", "context": json.dumps(context)}
    assert send(client, values).status_code == 200
    assert last_context(engine) == [(1, "Hi."), (1, "Ho.")]
    assert engine.requests[-1].context[1].codes.tolist() == CODES
    assert send(client, {"text": "Now.", "context": "[]"}).status_code == 200
    assert engine.requests[-1].context == []
    assert_refused(send(client, {**values, "context": "[{}]"}), 422, "context[0]")
    bad = [segment("Hi.", audio="AAAA")]
    assert_refused(send(client, {**values, "context": json.dumps(bad)}), 422, "context[0].audio")
    assert_refused(send(client, {**values, "conversation": "c"}), 422, "conversation")


def test_a_voice_comes_before_a_requests_context(client, engine):
    files = [("name", (None, "alice")), ("transcript", (None, "Hear."))]
    files.append(("audio", ("a.wav", base64.b64decode(wav()))))
    client.post("/v1/audio/voices", files=files)
    client.post("/generate", json={"text": "a", "voice": "alice", "context": [segment()]})
    assert last_context(engine) == [(0, "Hear."), (1, "Hi.")]


@pytest.mark.parametrize("chunked", [False, True])
def test_bodies_with_recordings_have_a_larger_bound(chunked, engine):
    def post(path, **fields):
        body = json.dumps(fields).encode()
        pieces = (body[i : i + 65_536] for i in range(0, len(body), 65_536))
        return client.post(path, content=pieces if chunked else body)

    with serve(engine, max_upload_bytes=500_000) as client:
        short, long = wav(seconds=6), wav(seconds=20)
        assert post("/generate", context=[segment(audio=short)], text="a").status_code == 200
        assert post(f"{PATH}/c/turns", **segment(audio=short)).status_code == 201
        assert_refused(post("/generate", context=[segment(audio=long)], text="a"), 413, "500000")
        assert_refused(post(f"{PATH}/c/turns", **segment(audio=long)), 413, "500000")
        parts = {"audio": ("a.wav", base64.b64decode(long))}
        assert_refused(client.post(f"{PATH}/c/turns", files=parts), 413, "500000")
        assert_refused(post("/generate", text="context" + "a" * 300_000), 413, "262144")
        assert_refused(post(f"{PATH}/c/interrupt", played_ms=0, audio=short), 413, "262144")


WRONG = {
    "no text": ("turns", {"speaker": 0, "codes": CODES}, 422, "text must"),
    "no speech": ("turns", {"speaker": 0, "text": "a"}, 422, "give either audio or codes"),
    "too few codebooks": ("turns", segment(codes=[[1]]), 422, "codes: frame 0"),
    "a broken recording": ("turns", segment(audio="AAAA"), 422, "audio: "),
    "a long text": ("turns", segment("a" * 100_001), 422, "at most 100000"),
    "no time": ("interrupt", {}, 422, "played_ms"),
    "a negative time": ("interrupt", {"played_ms": -1}, 422, "played_ms"),
    "text for a time": ("interrupt", {"played_ms": "1"}, 422, "played_ms"),
    "nothing spoken": ("interrupt", {"played_ms": 1}, 409, "nothing"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_fields_are_refused_and_named(case, client):
    path, fields, status_code, says = WRONG[case]
    client.post(PATH, json={"id": "c"})
    answer = client.post(f"{PATH}/c/{path}", json=fields)
    assert_refused(answer, status_code, says)
    assert "context" not in answer.text
    assert turns(client) == []
    assert_refused(client.post(f"{PATH}/c/{path}", data={"text": "a"}), 415)


def test_ids_are_checked(client):
    assert_refused(say(client, "a", "a/b"), 422, "id must be")
    assert_refused(client.post(f"{PATH}/a.b/turns", json=segment()), 422, "id must be")
    assert_refused(client.post(PATH, json={"id": "a b"}), 422, "id")
    assert_refused(client.post(f"{PATH}/x/interrupt", json={"played_ms": 0}), 404, "x")


def test_other_clients_have_other_conversations(engine):
    with serve(engine, api_key="a,b") as client:
        key_a, key_b = {"x-api-key": "a"}, {"x-api-key": "b"}
        body = {"text": "Secret.", "conversation": "c"}
        assert client.post("/generate", json=body, headers=key_a).status_code == 200
        assert_refused(client.get(f"{PATH}/c", headers=key_b), 404)
        assert_refused(client.delete(f"{PATH}/c", headers=key_b), 404)
        interrupted = client.post(f"{PATH}/c/interrupt", json={"played_ms": 0}, headers=key_b)
        assert_refused(interrupted, 404)
        body["text"] = "Mine."
        assert client.post("/generate", json=body, headers=key_b).status_code == 200
        assert last_context(engine) == []
        shown = client.get(f"{PATH}/c", headers=key_a).json()
        assert [t["text"] for t in shown["turns"]] == ["Secret."]
        assert_refused(client.get(f"{PATH}/c"), 401)


def test_a_failed_request_leaves_no_turn(client, engine):
    say(client, "One.")
    assert_refused(say(client, "nan"), 500)
    assert say(client, "nan", streaming=True).status_code == 200  # cut
    assert_refused(say(client, "x" * 3000), 422)
    assert_refused(say(client, "poison"), 500)
    assert say(client, "Two.").status_code == 200
    assert [t["text"] for t in turns(client)] == ["One.", "Two."]


@pytest.mark.parametrize("streaming", [False, True])
def test_an_engine_that_starts_again_in_the_middle(streaming, client, engine):
    say(client, "One.")
    engine.fail_at_step = engine.num_steps + 2
    answer = say(client, "Two.", streaming=streaming)
    assert engine.num_resets == 1
    if not streaming:  # begun again: there is one turn, of its second attempt
        assert answer.content[44:] == expected_pcm("Two.", 3)
        assert turns(client)[1]["seconds"] == 0.24
    assert say(client, "Three.").status_code == 200
    told = ["One."] if streaming else ["One.", "Two."]
    assert last_context(engine) == [(0, text) for text in told]


def test_an_answer_that_cannot_be_kept_does_not_end_the_conversation(client, engine, monkeypatch):
    def fails(segment):
        raise ValueError("a pattern of the tokenizer backtracks too much")

    engine.follows_context = False
    with monkeypatch.context() as patch:
        patch.setattr(engine.prompts, "tokens", fails, raising=False)
        assert say(client, "One.").content[44:] == expected_pcm("One.", 3)
    assert say(client, "Two.").status_code == 200
    assert [t["text"] for t in turns(client)] == ["Two."]


def test_what_ended_lately_can_still_be_interrupted(client):
    say(client, "One two three.")
    answer = client.post(f"{PATH}/c/interrupt", json={"played_ms": 81})
    assert answer.status_code == 200
    assert (answer.json()["heard_s"], answer.json()["text"]) == (0.16, "One two three.")
    assert turns(client)[0]["seconds"] == 0.16
    again = client.post(f"{PATH}/c/interrupt", json={"played_ms": 0})
    assert_refused(again, 409, "nothing")
    say(client, "Four five six.")
    assert client.post(f"{PATH}/c/interrupt", json={"played_ms": 0}).json()["text"] == ""
    assert len(turns(client)) == 1


class Live:
    """A server of an endless engine on a real socket."""

    def __init__(self, server: LiveServer):
        self.server = server

    def call(self, method: str, path: str, body=None) -> tuple[int, dict]:
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=TIMEOUT_S)
        connection.request(method, path, None if body is None else json.dumps(body))
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())

    def stream(self, text: str, **fields) -> http.client.HTTPResponse:
        return self.server.post(text=text, conversation="c", streaming=True, **fields)

    def texts(self) -> list[str]:
        return [t["text"] for t in self.call("GET", f"{PATH}/c")[1]["turns"]]


@pytest.fixture
def live(engine):
    engine.num_frames, engine.step_s = ENDLESS, 0.01
    with LiveServer(engine) as server:
        yield Live(server)


def test_an_interruption_ends_the_stream_and_keeps_what_was_heard(live, engine):
    # 39 characters last 3 s, 37.5 frames.
    stream = live.stream("Aaaa bbbb cccc dddd eeee ffff gggg hhhh.")
    stream.read(44 + 20 * 3840)
    assert live.call("GET", f"{PATH}/c")[1]["speaking"] is True
    status, answer = live.call("POST", f"{PATH}/c/interrupt", {"played_ms": 800})
    assert (status, answer["heard_s"], answer["text"]) == (200, 0.8, "Aaaa bbbb cccc")
    num_steps_then = engine.num_steps
    rest = stream.read()  # raises IncompleteRead if the stream was cut
    assert rest.endswith(b"\0\0")  # faded
    assert engine.saw_abort.wait(TIMEOUT_S)
    assert engine.num_steps <= num_steps_then + 2
    counts = live.call("GET", "/health")[1]["counts"]
    assert (counts["finished"], counts["cancelled"]) == ({"interrupted": 1}, 0)
    (turn,) = live.call("GET", f"{PATH}/c?codes=1")[1]["turns"]
    text = "Aaaa bbbb cccc dddd eeee ffff gggg hhhh."
    assert turn["codes"] == [fake_codes(text, i).tolist() for i in range(10)]
    assert live.call("POST", f"{PATH}/c/interrupt", {"played_ms": 800})[0] == 409
    engine.num_frames = 2
    assert live.stream("Next.").read()
    assert last_context(engine) == [(0, "Aaaa bbbb cccc")]


def test_a_whole_answer_that_is_interrupted_is_empty(live):
    with ThreadPoolExecutor(1) as pool:
        whole = pool.submit(live.server.post, text="a b", conversation="c")
        wait_until(lambda: live.call("GET", f"{PATH}/c")[1].get("speaking"))
        assert live.call("POST", f"{PATH}/c/interrupt", {"played_ms": 0})[0] == 200
        answer = whole.result()
    assert len(answer.read()) == 44
    assert answer.headers["x-finish-reason"] == "interrupted"
    assert live.texts() == []


def test_requests_are_answered_in_order(live, engine):
    first = live.stream("First.")
    first.read(44)
    with ThreadPoolExecutor(MAX_WAITING) as pool:
        waiting = []
        for i in range(MAX_WAITING):
            body = segment(f"User {i}.") if i % 2 else {"text": f"Text {i}.", "conversation": "c"}
            path = f"{PATH}/c/turns" if i % 2 else "/generate"
            connection = http.client.HTTPConnection(
                "127.0.0.1", live.server.port, timeout=TIMEOUT_S
            )
            connection.request("POST", path, json.dumps(body))
            waiting.append(pool.submit(connection.getresponse))
            wait_for_members(live, i + 2)
        refused = live.server.post(text="One too many.", conversation="c")
        assert (refused.status, refused.headers["retry-after"]) == (429, "1")
        engine.num_frames = 2
        first.read()
        assert all(response.result().status in (200, 201) for response in waiting)
    assert live.texts() == ["First.", "Text 0.", "User 1.", "Text 2.", "User 3."]


def wait_for_members(live: Live, number: int) -> None:
    """Wait until so many requests are in the conversation."""
    service = live.server.app.state.conversations
    wait_until(lambda: [line.num_members for line in list(service._lines.values())] == [number])


def test_requests_that_wait_are_bounded_by_their_memory(live, monkeypatch):
    monkeypatch.setattr(live.server.app.state.conversations._waiting, "max_bytes", 100)
    with live.stream("First.") as first:
        first.read(44)
        assert live.server.post(text="x" * 101, conversation="c").status == 429
        live.server.post_raw(text="x" * 50, conversation="c").close()


def test_a_client_that_leaves_while_it_waits_lets_the_next_one_in(live, engine):
    first = live.stream("First.")
    first.read(44)
    gone = live.server.post_raw(text="Gone.", conversation="c")
    wait_for_members(live, 2)
    gone.close()
    wait_for_members(live, 1)
    engine.num_frames = 2
    first.read()
    assert live.stream("Next.").read()
    assert [request.text for request in engine.requests] == ["First.", "Next."]


def test_a_client_that_leaves_midway_leaves_what_was_spoken(live, engine):
    stream = live.stream("Aaaa bbbb cccc dddd eeee ffff gggg hhhh.")
    stream.read(44 + 3840)
    stream.close()
    assert engine.saw_abort.wait(TIMEOUT_S)
    wait_until(lambda: not live.call("GET", f"{PATH}/c")[1]["speaking"])
    (turn,) = live.call("GET", f"{PATH}/c")[1]["turns"]
    assert turn["seconds"] >= 0.08
    assert "Aaaa bbbb cccc dddd eeee ffff gggg hhhh.".startswith(turn["text"])


def test_speech_goes_on_when_its_conversation_is_deleted(live, engine):
    first = live.stream("First.")
    first.read(44)
    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(live.server.post, text="Second.", conversation="c")
        wait_for_members(live, 2)
        assert live.call("DELETE", f"{PATH}/c")[0] == 200
        assert live.call("GET", f"{PATH}/c")[0] == 404
        engine.num_frames = 2
        assert first.read()
        assert second.result().status == 404
    live.stream("Third.").read()
    assert live.texts() == ["Third."]
    assert last_context(engine) == []


def test_idle_conversations_end(engine):
    with serve(engine, conversation_idle_s=0.05) as client:
        say(client, "One.")
        kept = client.app.state.conversations.kept
        assert len(kept) == 1
        wait_until(lambda: len(kept) == 0)
        assert_refused(client.get(f"{PATH}/c"), 404)


def test_the_least_recently_used_conversation_makes_room(engine):
    with serve(engine, max_conversations=2) as client:
        for key in "abcbd":
            assert say(client, "One.", key).status_code == 200
        statuses = [client.get(f"{PATH}/{key}").status_code for key in "abcd"]
        assert statuses == [404, 200, 404, 200]


def test_contexts_at_once_are_bounded_by_their_memory(engine, monkeypatch):
    monkeypatch.setattr("vox_serve.voice_service.CONTEXT_BYTES", 150_000)
    encoding, go_on = threading.Event(), threading.Event()

    def wait() -> None:
        encoding.set()
        assert go_on.wait(TIMEOUT_S)

    engine.mimi.before_piece = wait
    body = {"text": "a", "context": [segment(audio=wav())]}  # 50 KB
    with serve(engine, max_body_bytes=100_000) as client, ThreadPoolExecutor(2) as pool:
        answers = [pool.submit(client.post, "/generate", json=body) for _ in range(2)]
        assert encoding.wait(TIMEOUT_S)
        contexts = client.app.state.voices._contexts
        wait_until(lambda: contexts.num_bytes > 100_000)
        refused = client.post("/generate", json=body)
        assert_refused(refused, 429, "try later")
        assert refused.headers["retry-after"]
        go_on.set()
        assert [answer.result().status_code for answer in answers] == [200, 200]
        assert contexts.num_bytes == 0


def test_a_client_that_leaves_while_its_context_waits_costs_no_encoding(live, engine):
    encoding, go_on = threading.Event(), threading.Event()
    pieces = []

    def wait() -> None:
        pieces.append(0)
        encoding.set()
        assert go_on.wait(TIMEOUT_S)

    engine.mimi.before_piece, engine.num_frames = wait, 2
    contexts = live.server.app.state.voices._contexts
    body = {"text": "a", "context": [segment(audio=wav(seconds=0.5))]}  # one piece
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(live.server.post, **body)
        assert encoding.wait(TIMEOUT_S)
        held = contexts.num_bytes
        gone = live.server.post_raw(**body)
        wait_until(lambda: contexts.num_bytes == 2 * held)
        gone.close()
        wait_until(lambda: contexts.num_bytes == held)
        go_on.set()
        assert first.result().status == 200
    assert len(pieces) == 1


def test_memory_of_frames_is_freed(client, engine):
    jobs = []
    submit = Runner.submit

    def spy(self, *args, **fields):
        jobs.append(submit(self, *args, **fields))
        return jobs[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Runner, "submit", spy)
        say(client, "One.")
        say(client, "One.", None)
    assert [job.frames for job in jobs] == [[], []]
    assert [job.keeps_frames for job in jobs] == [True, False]
