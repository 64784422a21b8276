"""OpenAI's speech API and its formats, over HTTP without a socket."""

import json
from base64 import b64decode

import pytest
from fastapi.testclient import TestClient

from audio_decoding import with_av
from encoded import NOTE, streamed, whole
from fake_engine import FakeEngine, expected_pcm
from vox_serve.api import create_app
from vox_serve.audio import wav_file
from vox_serve.config import Config
from vox_serve.formats import FORMATS
from vox_serve.openai_api import VOICES
from vox_serve.runner import Runner

SPEECH = "/v1/audio/speech"
NAMES = pytest.mark.parametrize("name", FORMATS)


def serve(engine: FakeEngine, **settings) -> TestClient:
    config = Config(**settings)
    runner = Runner.for_config(engine, config)
    return TestClient(create_app(runner, config, {}), raise_server_exceptions=False)


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def client(engine):
    with serve(engine) as client:
        yield client


def ask(client, **fields):
    return client.post(SPEECH, json={"model": "tts-1", "input": "hello", **fields})


def assert_openai_error(answer, status_code: int, says: str = "", param: str | None = None) -> None:
    assert answer.status_code == status_code, answer.text
    fields = answer.json()
    assert fields["detail"]
    error = fields["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert says in error["message"]
    assert error["param"] == param


def events_of(answer) -> list[dict]:
    assert answer.headers["content-type"].startswith("text/event-stream")
    *events, end = answer.text.split("\n\n")
    assert end == ""
    return [json.loads(event.removeprefix("data: ")) for event in events]


@NAMES
def test_a_streamed_answer(name, client):
    answer = ask(client, response_format=name)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == FORMATS[name].media_type
    assert answer.headers["x-synthetic-speech"] == NOTE
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["x-accel-buffering"] == "no"
    assert "content-length" not in answer.headers
    assert answer.content == streamed("hello", 3, name)


@NAMES
def test_a_whole_answer(name, client):
    answer = ask(client, response_format=name, streaming=False)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == FORMATS[name].media_type
    assert answer.headers["content-length"] == str(len(answer.content))
    assert answer.headers["x-finish-reason"] == "stop"
    assert answer.content == whole("hello", 3, name)


def test_mp3_is_the_default(client):
    assert ask(client).content == streamed("hello", 3, "mp3")
    assert ask(client, response_format=None).content == streamed("hello", 3, "mp3")


def test_a_form(client):
    form = {"input": "hello", "response_format": "flac", "voice": "nova"}
    assert client.post(SPEECH, data=form).content == streamed("hello", 3, "flac")
    answer = client.post(SPEECH, data=form | {"stream": "false"})
    assert answer.content == whole("hello", 3, "flac")


@pytest.mark.parametrize("streaming", [False, True])
def test_fields_that_change_nothing(client, streaming):
    answer = ask(
        client,
        voice="alloy",
        instructions="Speak cheerfully.",
        speed=1.0,
        stream_format="audio",
        response_format="flac",
        stream=streaming,
    )
    assert answer.content == (streamed if streaming else whole)("hello", 3, "flac")


@pytest.mark.parametrize(
    ("voice", "speaker"), [*VOICES.items(), ("0", "0"), ("1", "1"), ({"id": "onyx"}, "1")]
)
def test_voices(voice, speaker, client, engine):
    assert ask(client, voice=voice).status_code == 200
    assert engine.requests[-1].speaker == int(speaker)


def test_an_added_voice_goes_before_openais(client, engine, monkeypatch):
    store = client.app.state.voices.store
    monkeypatch.setattr(store, "names", lambda: ["alloy"])
    assert_openai_error(ask(client, voice="alloy"), 404, "alloy")  # looked up, and not mapped


def test_our_own_fields(client, engine):
    fields = {"seed": 7, "temperature": 0.5, "top_k": 3, "max_frames": 2, "speaker": 1}
    answer = ask(client, response_format="pcm", conversation="c1", **fields)
    assert answer.content == expected_pcm("hello", 2, seed=7, cut=True)
    request = engine.requests[-1]
    assert (request.speaker, request.sampling.seed, request.sampling.top_k) == (1, 7, 3)
    assert len(client.get("/v1/conversations/c1").json()["turns"]) == 1


@pytest.mark.parametrize("name", ["mp3", "opus", "wav", "pcm"])
def test_events(name, client):
    *deltas, done = events_of(ask(client, response_format=name, stream_format="sse"))
    assert {event["type"] for event in deltas} == {"speech.audio.delta"}
    audio = b"".join(b64decode(event["audio"]) for event in deltas)
    assert audio == streamed("hello", 3, name)
    assert done["type"] == "speech.audio.done"
    assert done["usage"] == {"input_tokens": 5, "output_tokens": 3, "total_tokens": 8}
    assert done["finish_reason"] == "stop"


def test_a_failure_is_an_event(client):
    *deltas, last = events_of(ask(client, input="nan", response_format="pcm", stream_format="sse"))
    assert deltas[0]["type"] == "speech.audio.delta"
    assert last["type"] == "error"
    assert "not finite" in last["error"]["message"]


@pytest.mark.parametrize("name", ["mp3", "opus", "aac", "flac"])
def test_a_cut_stream_is_still_a_file(name, client):
    content = ask(client, input="nan", response_format=name).content  # fails after two frames
    decoded = with_av(content)
    assert len(decoded.samples) >= 3840 * decoded.rate_hz // 24_000


def test_an_unsupported_format_is_400_and_lists_the_others(client, engine):
    for body in ({"response_format": "m4a"}, {"response_format": "MP3"}):
        answer = ask(client, **body)
        assert_openai_error(
            answer, 400, "wav, pcm, mp3, opus, aac, flac or ulaw", "response_format"
        )
    answer = ask(client, response_format="mp3", sample_rate=8000)
    assert_openai_error(answer, 400, "24000", "sample_rate")
    answer = client.post("/generate", json={"text": "a", "format": "m4a"})
    assert answer.status_code == 400
    assert "ulaw" in answer.json()["detail"]
    assert not engine.requests


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": ""}, "input"),
        ({"input": " "}, "input"),
        ({"input": None}, "input"),
        ({"input": 5}, "input"),
        ({"text": "a"}, "text"),
        ({"format": "mp3"}, "format"),
        ({"speed": 0.2}, "speed"),
        ({"speed": 4.1}, "speed"),
        ({"speed": "fast"}, "speed"),
        ({"response_format": 5}, "response_format"),
        ({"stream_format": "ws"}, "stream_format"),
        ({"stream": True, "streaming": True}, "stream"),
        ({"voice": 5}, "voice"),
        ({"voice": {"name": "x"}}, "voice"),
        ({"voice": {"id": 5}}, "voice"),
        ({"model": 5}, "model"),
        ({"instructions": ["a"]}, "instructions"),
        ({"temprature": 1}, "temprature"),
        ({"temperature": -1}, "temperature"),
    ],
)
def test_an_invalid_field_is_400_and_named(fields, param, client, engine):
    assert_openai_error(ask(client, **fields), 400, param=param)
    assert not engine.requests


def test_other_errors_have_openais_shape_too(client):
    assert_openai_error(ask(client, voice="nobody"), 404, "nobody")
    assert_openai_error(client.get("/v1/audio/voices/nobody"), 404, "nobody")
    assert_openai_error(client.get("/v1/conversations/none"), 404, "none")
    assert_openai_error(client.get("/v1/nothing"), 404)
    assert_openai_error(client.get(SPEECH), 405)
    assert_openai_error(client.post(SPEECH, content=b"{"), 400, "JSON")
    answer = client.head("/v1/audio/voices/nobody")
    assert (answer.status_code, answer.content) == (404, b"")
    assert "error" not in client.post("/generate", json={}).json()


def test_a_wrong_key_has_openais_shape():
    with serve(FakeEngine(), api_key="right") as client:
        answer = ask(client)
        assert_openai_error(answer, 401, "API key")
        assert answer.json()["error"]["code"] == "invalid_api_key"
        answer = client.get("/v1/models", headers={"Authorization": "Bearer right"})
        assert answer.status_code == 200


def test_models():
    with serve(FakeEngine(), model="sesame/csm-1b") as client:
        (model,) = client.get("/v1/models").json()["data"]
        assert model["id"] == "sesame/csm-1b"
        assert (model["object"], model["owned_by"]) == ("model", "voxkern")
        assert client.get("/v1/models/sesame/csm-1b").json() == model
        listed = client.get("/v1/audio/models").json()
        assert listed["data"] == [model]
        assert listed["models"] == [{"id": "sesame/csm-1b", "name": "sesame/csm-1b"}]
        answer = client.get("/v1/models/gpt-5")
        assert_openai_error(answer, 404, "gpt-5", "model")
        assert answer.json()["error"]["code"] == "model_not_found"


def test_a_folder_is_not_told():
    with serve(FakeEngine(), model="/srv/secret/my-csm") as client:
        assert client.get("/v1/models").json()["data"][0]["id"] == "my-csm"
        assert ask(client).headers["x-synthetic-speech"].endswith(", my-csm")


@NAMES
@pytest.mark.parametrize("streaming", [False, True])
def test_generate_in_every_format(name, streaming, client):
    answer = client.post(
        "/generate", json={"text": "hello", "format": name, "streaming": streaming}
    )
    assert answer.headers["content-type"] == FORMATS[name].media_type
    assert answer.content == (streamed if streaming else whole)("hello", 3, name)
    form = {"text": "hello", "format": name, "streaming": str(streaming).lower()}
    assert client.post("/generate", data=form).content == answer.content


def test_the_accept_header_chooses_a_format(client):
    def accepting(accept: str, **fields) -> bytes:
        headers = {"Accept": accept}
        return client.post("/generate", json={"text": "hello", **fields}, headers=headers).content

    plain = wav_file(expected_pcm("hello", 3))
    assert accepting("audio/mpeg") == whole("hello", 3, "mp3")
    assert accepting("audio/ogg, */*;q=0.5") == whole("hello", 3, "opus")
    for accept in ("*/*", "audio/*", "audio/wav", "text/html", ""):
        assert accepting(accept) == plain
    assert accepting("audio/mpeg", format="flac") == whole("hello", 3, "flac")


def test_a_plain_wav_has_only_its_header_and_samples(client):
    answer = client.post("/generate", json={"text": "hello"})
    assert answer.content == wav_file(expected_pcm("hello", 3))
    assert answer.headers["x-synthetic-speech"] == NOTE
    named = client.post("/generate", json={"text": "hello", "format": "wav"}).content
    assert named[44 : len(answer.content)] == answer.content[44:]
    assert b"LIST" in named


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("name", "rate_hz"), [("pcm", 8000), ("pcm", 48_000), ("wav", 16_000)])
def test_sample_rates(name, rate_hz, streaming, client):
    fields = {"text": "hello", "format": name, "sample_rate": rate_hz, "streaming": streaming}
    answer = client.post("/generate", json=fields)
    assert answer.content == (streamed if streaming else whole)("hello", 3, name, rate_hz=rate_hz)
    if name == "pcm":
        assert len(answer.content) == 3 * 3840 * rate_hz // 24_000
        assert answer.headers["x-sample-rate"] == str(rate_hz)


@pytest.mark.parametrize("fields", [{"sample_rate": 48_000}, {"speed": 0.5}])
@pytest.mark.parametrize("num_spare_bytes", [0, -1])
def test_an_answer_that_grows_beyond_the_memory_is_refused(fields, num_spare_bytes):
    fields = fields | {"response_format": "wav", "streaming": False}
    with serve(FakeEngine()) as client:
        size = len(ask(client, **fields).content)
    runner = Runner(FakeEngine(), 2, max_unread_bytes=size + num_spare_bytes)
    with TestClient(create_app(runner, Config(), {})) as client:
        answer = ask(client, **fields)
        assert answer.status_code == (200 if num_spare_bytes == 0 else 429)
        assert ("retry-after" in answer.headers) == (num_spare_bytes != 0)
        counts = runner.totals()
        assert (counts["refused"], counts["stalled"]) == (-num_spare_bytes, 0)
        assert runner.unread_bytes == 0


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("speed", [0.5, 4])
def test_speed(speed, streaming):
    with serve(FakeEngine(num_frames=20)) as client:
        for name in FORMATS:
            fields = {"response_format": name, "streaming": streaming, "speed": speed}
            answer = ask(client, **fields)
            assert answer.content == (streamed if streaming else whole)(
                "hello", 20, name, speed=speed
            )


def test_an_empty_utterance():
    with serve(FakeEngine(num_frames=0)) as client:
        for name in FORMATS:
            for streaming in (False, True):
                answer = ask(client, response_format=name, streaming=streaming)
                assert answer.status_code == 200
                assert answer.content == whole("hello", 0, name)
        *deltas, done = events_of(ask(client, stream_format="sse"))
        assert b"".join(b64decode(delta["audio"]) for delta in deltas)  # a valid file
        assert done["usage"]["output_tokens"] == 0


def test_a_path_of_a_proxy():
    with serve(FakeEngine(), root_path="/tts/", api_key="key") as client:
        for path in ("/tts/health/ready", "/health/ready"):
            assert client.get(path).status_code == 200
        for path in ("/tts/v1/models", "/v1/models"):
            assert_openai_error(client.get(path), 401)
            assert client.get(path, headers={"X-API-Key": "key"}).status_code == 200
        assert client.get("/ttsx/health/ready", headers={"X-API-Key": "key"}).status_code == 404
        schema = client.get("/tts/openapi.json", headers={"X-API-Key": "key"}).json()
        assert schema["servers"] == [{"url": "/tts"}]
