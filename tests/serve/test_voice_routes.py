"""Voices over HTTP: add, list, describe, hear, delete, and speak in one."""

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

from fake_engine import CODEBOOK_SIZE, TIMEOUT_S, FakeEngine
from http_testing import SENDERS, assert_refused
from live_server import LiveServer, wait_until
from vox_serve.api import create_app
from vox_serve.config import Config
from vox_serve.runner import Runner
from vox_serve.voice_file import MAX_RECORDINGS

VOICES = "/v1/audio/voices"


def serve(engine: FakeEngine, **settings) -> TestClient:
    config = Config(**settings)
    app = create_app(Runner.for_config(engine, config), config, {})
    return TestClient(app, raise_server_exceptions=False)


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture(params=["folder", "memory"])
def client(engine, request, tmp_path):
    settings = {"voices": str(tmp_path / "voices")} if request.param == "folder" else {}
    with serve(engine, **settings) as client:
        yield client


def wav(level: float = 0.5, seconds: float = 0.8, form: str = "WAV", rate_hz: int = 24_000):
    """A tone that fills its frames, as a recording's bytes."""
    t = np.arange(int(seconds * rate_hz)) / rate_hz
    file = io.BytesIO()
    soundfile.write(file, level * np.sin(2 * np.pi * 440 * t), rate_hz, format=form)
    return file.getvalue()


def as_json(client, name="alice", recordings=None, **fields):
    recordings = recordings or [(wav(), "Hello.")]
    entries = [{"audio": base64.b64encode(a).decode(), "transcript": t} for a, t in recordings]
    return client.post(VOICES, json={"name": name, "recordings": entries, **fields})


def as_form(client, name="alice", recordings=None, **fields):
    parts = [("name", (None, name)), *((key, (None, str(v))) for key, v in fields.items())]
    for audio, transcript in recordings or [(wav(), "Hello.")]:
        parts += [("audio", ("a.wav", audio)), ("transcript", (None, transcript))]
    return client.post(VOICES, files=parts)


ADDERS = pytest.mark.parametrize("add", [as_json, as_form])


@ADDERS
def test_a_voice_is_added_listed_heard_and_deleted(add, client):
    recordings = [(wav(0.5), "Hello, wörld."), (wav(0.25, 0.4, "FLAC"), "你好")]
    answer = add(client, "Alice", recordings, speaker=1)
    assert answer.status_code == 201, answer.text
    voice = answer.json()
    assert (voice["id"], voice["name"], voice["speaker"]) == ("Alice", "Alice", 1)
    assert [r["transcript"] for r in voice["recordings"]] == ["Hello, wörld.", "你好"]
    assert voice["duration_s"] == pytest.approx(sum(r["duration_s"] for r in voice["recordings"]))
    assert client.get(f"{VOICES}/alice").json() == voice
    assert [v["id"] for v in client.get(VOICES).json()["data"]] == ["0", "1", "Alice"]
    assert client.get(VOICES).json()["data"][2] == voice
    names = [{"id": name, "name": name} for name in ("0", "1", "Alice")]
    assert client.get(VOICES).json()["voices"] == names  # Open WebUI reads these
    sample = client.get(f"{VOICES}/alice/sample")
    assert sample.headers["content-type"] == "audio/wav"
    audio, rate_hz = soundfile.read(io.BytesIO(sample.content))
    assert rate_hz == 24_000
    assert len(audio) == round(voice["duration_s"] * 24_000)
    # The fake codec codes each frame's mean, of a sine 2 / pi of its peak.
    assert audio[4800] == pytest.approx(0.5 * 2 / np.pi, abs=1 / CODEBOOK_SIZE)
    assert client.delete(f"{VOICES}/Alice").json()["deleted"] is True
    for path in ("alice", "alice/sample"):
        assert_refused(client.get(f"{VOICES}/{path}"), 404, "alice")
    assert_refused(client.delete(f"{VOICES}/alice"), 404, "alice")


@SENDERS
def test_speech_in_a_voice_has_its_segments_as_context(send, client, engine):
    assert as_form(client, recordings=[(wav(), "Hello."), (wav(0.2), "Bye.")], speaker=7)
    answer = send(client, {"text": "I speak.", "voice": "ALICE"})
    assert answer.status_code == 200
    request = engine.requests[-1]
    assert (request.text, request.speaker) == ("I speak.", 7)
    assert [(s.speaker, s.text) for s in request.context] == [(7, "Hello."), (7, "Bye.")]
    codes = request.context[0].codes
    assert (codes.dtype, codes.shape[1]) == (torch.int64, engine.num_codebooks)
    assert codes[3].tolist() == [int(0.5 * 2 / np.pi * CODEBOOK_SIZE)] * engine.num_codebooks


@SENDERS
def test_the_speakers_are_voices(send, client, engine):
    for name in ("0", "1"):
        assert send(client, {"text": "a", "voice": name}).status_code == 200
        assert (engine.requests[-1].speaker, engine.requests[-1].context) == (int(name), None)
    assert send(client, {"text": "a", "voice": "1", "speaker": 1}).status_code == 200
    for path in ("", "/sample"):
        assert client.get(f"{VOICES}/1{path}").status_code == 200
    assert client.get(f"{VOICES}/1").json()["built_in"] is True
    assert engine.requests[-1].speaker == 1
    assert_refused(client.delete(f"{VOICES}/0"), 403, "built in")
    assert_refused(as_form(client, "0"), 422, "name")


@SENDERS
@pytest.mark.parametrize("of_model", [True, False], ids=["the model", "a setting"])
def test_more_speakers(send, of_model, engine, monkeypatch):
    """The model says how many speakers there are, or a setting does."""
    if of_model:
        monkeypatch.setattr(engine.prompts.config, "num_speakers", 1000)
    with serve(engine, **({} if of_model else {"max_speaker": 999})) as client:
        for fields in ({"speaker": 999}, {"voice": "999"}, {"voice": "999", "speaker": 999}):
            assert send(client, {"text": "a", **fields}).status_code == 200
            assert engine.requests[-1].speaker == 999
        assert_refused(send(client, {"text": "a", "speaker": 1000}), 422, "speaker")
        assert_refused(send(client, {"text": "a", "voice": "1000"}), 404, "0, 1, 2, 3")
        assert_refused(send(client, {"text": "a", "voice": "0999"}), 404, "0, 1, 2, 3")
        assert client.get(f"{VOICES}/999").json()["speaker"] == 999
        assert_refused(client.delete(f"{VOICES}/999"), 403, "built in")
        assert len(client.get(VOICES).json()["data"]) == 16
        paths = client.get("/openapi.json").json()["paths"]
        body = paths["/generate"]["post"]["requestBody"]["content"]["application/json"]
        assert body["schema"]["properties"]["speaker"]["maximum"] == 999


@SENDERS
def test_a_contradictory_speaker_is_422_and_an_unknown_voice_404(send, client):
    as_form(client, speaker=1)
    assert_refused(send(client, {"text": "a", "voice": "1", "speaker": 0}), 422, "speaker")
    assert_refused(send(client, {"text": "a", "voice": "alice", "speaker": 0}), 422, "speaker")
    assert send(client, {"text": "a", "voice": "alice", "speaker": 1}).status_code == 200
    assert_refused(send(client, {"text": "a", "voice": "bob"}), 404, "0, 1, alice")
    assert_refused(send(client, {"text": "a", "voice": "../alice"}), 404, "0, 1, alice")
    assert_refused(client.post("/generate", json={"text": "a", "voice": 0}), 422, "voice")
    body = json.dumps({"text": "a", "voice": "\ud800"})
    assert_refused(client.post("/generate", content=body), 422, "voice")


@ADDERS
def test_a_taken_name_is_409_until_replace_is_set(add, client):
    assert add(client).status_code == 201
    assert_refused(add(client, "ALICE"), 409, "ALICE")
    answer = add(client, recordings=[(wav(), "New.")], replace="true" if add is as_form else True)
    assert answer.status_code == 201
    (voice,) = client.get(VOICES).json()["data"][2:]
    assert voice["recordings"][0]["transcript"] == "New."


def test_of_concurrent_adds_of_a_name_one_succeeds(engine):
    with serve(engine, api_key=",".join("abcd")) as client, ThreadPoolExecutor(4) as pool:

        def add(key: str) -> int:
            headers = {"x-api-key": key}
            files = [
                ("name", (None, "alice")),
                ("audio", ("a", wav())),
                ("transcript", (None, "x")),
            ]
            return client.post(VOICES, files=files, headers=headers).status_code

        assert sorted(pool.map(add, "abcd")) == [201, 409, 409, 409]


def test_deleting_a_voice_in_use_harms_nobody(engine):
    engine.step_s, engine.num_frames = 0.01, 30
    with serve(engine) as client, ThreadPoolExecutor(2) as pool:
        as_form(client)
        plain = client.post("/generate", json={"text": "long", "seed": 1}).content
        speech = pool.submit(
            client.post, "/generate", json={"text": "long", "seed": 1, "voice": "alice"}
        )
        while len(engine.requests) < 2:
            pass
        assert client.delete(f"{VOICES}/alice").status_code == 200
        assert speech.result().content == plain
        assert_refused(client.post("/generate", json={"text": "a", "voice": "alice"}), 404, "alice")


def test_a_folder_keeps_voices_for_the_next_server(tmp_path, engine):
    with serve(engine, voices=str(tmp_path)) as client:
        voice = as_form(client).json()
    with serve(engine, voices=str(tmp_path)) as client:
        assert client.get(f"{VOICES}/alice").json() == voice
    with serve(engine) as client:
        assert_refused(client.get(f"{VOICES}/alice"), 404)


WRONG = {
    "no name": ({"recordings": 1}, 422, "name"),
    "a name with a slash": ({"name": "a/b", "recordings": 1}, 422, "name must be"),
    "a name of dots": ({"name": "..", "recordings": 1}, 422, "name must be"),
    "a number as name": ({"name": 5, "recordings": 1}, 422, "name"),
    "no recordings": ({"name": "a"}, 422, "recordings"),
    "an empty list": ({"name": "a", "recordings": []}, 422, "recordings"),
    "recordings of another type": ({"name": "a", "recordings": {"audio": "x"}}, 422, "recordings"),
    "a number as recording": ({"name": "a", "recordings": [5]}, 422, "recordings"),
    "no audio": ({"name": "a", "recordings": [{"transcript": "x"}]}, 422, "audio"),
    "no transcript": ({"name": "a", "recordings": [{"audio": "UklGRg=="}]}, 422, "transcript"),
    "a negative speaker": ({"name": "a", "speaker": -1, "recordings": 1}, 422, "speaker"),
    "an unknown field": ({"name": "a", "spaeker": 1, "recordings": 1}, 422, "spaeker"),
    "not base64": ({"name": "a", "recordings": [{"audio": "?", "transcript": "x"}]}, 422, "base64"),
    "base64 beyond ASCII": (
        {"name": "a", "recordings": [{"audio": "ä", "transcript": "x"}]}, 422, "base64"
    ),
    "no audio file": (
        {"name": "a", "recordings": [{"audio": "AAAA", "transcript": "x"}]}, 422, "recordings.0"
    ),
    "an empty file": (
        {"name": "a", "recordings": [{"audio": "", "transcript": "x"}]}, 422, "audio"
    ),
    "a blank transcript": (
        {"name": "a", "recordings": [{"audio": "AAAA", "transcript": " "}]}, 422, "transcript"
    ),
    "a lone surrogate": (
        {"name": "a", "recordings": [{"audio": "AAAA", "transcript": "\ud800"}]}, 422, "transcript"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_fields_are_422_and_named(case, client):
    fields, status_code, says = WRONG[case]
    if fields.get("recordings") == 1:
        entry = {"audio": base64.b64encode(wav()).decode(), "transcript": "x"}
        fields = fields | {"recordings": [entry]}
    assert_refused(client.post(VOICES, content=json.dumps(fields)), status_code, says)
    assert len(client.get(VOICES).json()["data"]) == 2


def test_a_form_needs_a_transcript_for_each_recording(client):
    parts = [("name", (None, "a")), ("audio", ("a.wav", wav())), ("audio", ("b.wav", wav()))]
    assert_refused(client.post(VOICES, files=parts), 422, "2 audio and 0 transcript")
    twice = [("name", (None, "a")), ("name", (None, "b"))]
    assert_refused(client.post(VOICES, files=twice), 422, "name")
    many = [(wav(), "x")] * (MAX_RECORDINGS + 1)
    assert_refused(as_form(client, recordings=many), 400, "files")
    assert_refused(as_json(client, recordings=many), 422, "recordings")


@pytest.mark.parametrize(
    ("recordings", "says"),
    [
        ([(wav(seconds=0.01), "x")], "10 ms"),
        ([(wav(level=0), "x")], "silent"),
        ([(wav(), "x"), (wav(seconds=30), "x")], "recordings.1"),
        ([(wav(seconds=12), "x")] * 2, "256"),
        ([(wav(), "x" * 300)], "256"),
        ([(wav()[:60], "x")], "recordings.0"),
    ],
    ids=["10 ms", "silent", "30 s", "too long together", "a long transcript", "cut short"],
)
@ADDERS
def test_recordings_that_make_no_prompt_are_422_with_the_reason(add, recordings, says, client):
    assert_refused(add(client, recordings=recordings), 422, says)


def test_bodies_are_bounded_apart_from_those_of_generate(engine):
    with serve(engine, max_upload_bytes=100_000, max_body_bytes=1024) as client:
        assert as_form(client).status_code == 201
        assert_refused(as_form(client, "bob", [(wav(seconds=3), "x")]), 413, "100000")
        assert_refused(as_json(client, "bob", [(wav(seconds=3), "x")]), 413, "100000")
        assert_refused(client.post("/generate", json={"text": "x" * 2000}), 413, "1024")


def test_json_has_a_bound_of_its_own(client):
    content = b'{"name": "' + b"x" * 2**23
    headers = {"content-type": "application/json"}
    assert_refused(client.post(VOICES, content=content, headers=headers), 413, str(2**23))


@pytest.mark.parametrize(
    ("content_type", "content", "status_code"),
    [("text/plain", b"x", 415), ("audio/wav", b"RIFF", 415), ("application/json", b"{", 400),
     ("application/json", b"[]", 422), ("application/x-www-form-urlencoded", b"name=a", 415),
     ("multipart/form-data", b"no boundary", 400),
     ("multipart/form-data; boundary=x", b"no boundary", 400)],
)  # fmt: skip
def test_broken_bodies_are_refused(content_type, content, status_code, client):
    answer = client.post(VOICES, content=content, headers={"content-type": content_type})
    assert_refused(answer, status_code)


def test_the_number_of_voices_is_bounded(engine):
    with serve(engine, max_voices=1) as client:
        assert as_form(client).status_code == 201
        assert_refused(as_form(client, "bob"), 409, "1 voices")


def test_a_voice_that_cannot_be_written_is_507(engine, tmp_path, monkeypatch):
    with serve(engine, voices=str(tmp_path)) as client:

        def fail(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("vox_serve.voice_store.replaced", fail)
        assert_refused(as_form(client), 507, "No space left")
        monkeypatch.undo()
        assert as_form(client).status_code == 201


def test_a_voice_that_cannot_be_deleted_is_507(engine, tmp_path, monkeypatch):
    with serve(engine, voices=str(tmp_path)) as client:
        as_form(client)

        def fail(*_):
            raise OSError(30, "Read-only file system")

        monkeypatch.setattr("pathlib.Path.unlink", fail)
        assert_refused(client.delete(f"{VOICES}/alice"), 507, "Read-only")
        monkeypatch.undo()
        assert client.delete(f"{VOICES}/alice").status_code == 200


def test_one_upload_of_a_client_at_a_time(engine):
    encoding, go_on = threading.Event(), threading.Event()

    def wait() -> None:
        encoding.set()
        assert go_on.wait(TIMEOUT_S)

    engine.mimi.before_piece = wait
    with serve(engine, api_key="a,b") as client, ThreadPoolExecutor(2) as pool:
        key_a, key_b = {"x-api-key": "a"}, {"x-api-key": "b"}
        files = {"name": (None, "alice"), "audio": ("a", wav()), "transcript": (None, "x")}
        first = pool.submit(client.post, VOICES, files=files, headers=key_a)
        assert encoding.wait(TIMEOUT_S)
        answer = client.post(VOICES, files=files, headers=key_a)
        assert_refused(answer, 429, "upload")
        assert answer.headers["retry-after"]
        # Speech is not held up by what is encoded.
        assert client.post("/generate", json={"text": "a"}, headers=key_b).status_code == 200
        files["name"] = (None, "bob")
        second = pool.submit(client.post, VOICES, files=files, headers=key_b)
        go_on.set()
        assert (first.result().status_code, second.result().status_code) == (201, 201)


def test_unfinished_uploads_are_bounded_together(engine):
    go_on = threading.Event()
    engine.mimi.before_piece = lambda: go_on.wait(TIMEOUT_S)
    recordings = [(wav(), "x" * 40)]
    with (
        serve(engine, max_upload_bytes=50_000, api_key="a,b,c,d,e,f") as client,
        ThreadPoolExecutor(6) as pool,
    ):

        def add(key: str) -> int:
            parts = [("name", (None, key)), ("transcript", (None, recordings[0][1]))]
            parts += [("audio", ("a.wav", recordings[0][0]))]
            return client.post(VOICES, files=parts, headers={"x-api-key": key}).status_code

        # Each has 39,000 bytes, and 200,000 fit.
        added = [pool.submit(add, key) for key in "abcdef"]
        wait_until(lambda: sum(future.done() for future in added) == 1)
        go_on.set()
        assert sorted(future.result() for future in added) == [201] * 5 + [429]


def test_the_end_of_the_server_gives_up_what_is_encoded(engine):
    encoding, go_on = threading.Event(), threading.Event()

    def wait() -> None:
        encoding.set()
        assert go_on.wait(TIMEOUT_S)

    engine.mimi.before_piece = wait
    audio = base64.b64encode(wav(seconds=10)).decode()
    body = {"name": "alice", "recordings": [{"audio": audio, "transcript": "x"}]}
    with LiveServer(engine) as server, ThreadPoolExecutor(1) as pool:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=TIMEOUT_S)
        connection.request("POST", VOICES, json.dumps(body))
        assert encoding.wait(TIMEOUT_S)
        stopping = pool.submit(server.stop)
        wait_until(lambda: server.runner.draining)
        go_on.set()
        assert connection.getresponse().status == 503
        stopping.result()


@pytest.mark.parametrize("path", ["", "/alice", "/alice/sample"])
def test_access_checks_apply(path, engine):
    with serve(engine, api_key="secret") as client:
        assert_refused(client.get(VOICES + path), 401)
        assert_refused(client.delete(f"{VOICES}/alice"), 401)
        assert_refused(as_form(client), 401)
        headers = {"origin": "https://evil.example", "x-api-key": "secret"}
        assert_refused(client.get(VOICES + path, headers=headers), 403)
        assert_refused(client.post(VOICES, json={}, headers=headers), 403)
