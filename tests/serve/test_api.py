import io
import json
import wave
from urllib.parse import urlencode

import pytest
import soundfile
from fastapi.testclient import TestClient

from fake_engine import FakeEngine, expected_pcm
from http_testing import (
    OVERRIDES,
    SENDERS,
    SPOKEN,
    as_multipart,
    as_urlencoded,
    assert_refused,
)
from vox_serve.api import GenerateRequest, create_app
from vox_serve.audio import wav_file, wav_header
from vox_serve.config import Config, SpeechSettings
from vox_serve.runner import Runner
from vox_serve.sampling import SamplingParams
from vox_serve.text_bound import frames_bound

DESCRIPTION = {"model": "fake", "device": "cpu", "dtype": "float32", "backend": "none"}


def serve(engine: FakeEngine, **settings) -> TestClient:
    config = Config(**settings)
    runner = Runner.for_config(engine, config)
    return TestClient(create_app(runner, config, DESCRIPTION), raise_server_exceptions=False)


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def client(engine):
    with serve(engine) as client:
        yield client


@SENDERS
def test_a_whole_answer(send, client):
    answer = send(client, {"text": "hello"})
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "audio/wav"
    assert answer.headers["content-length"] == str(len(answer.content))
    assert answer.content == wav_file(expected_pcm("hello", 3))
    with wave.open(io.BytesIO(answer.content)) as reader:
        assert reader.getparams()[:4] == (1, 2, 24_000, 3 * 1920)


@SENDERS
def test_a_streamed_answer_has_the_same_samples(send, client):
    answer = send(client, {"text": "hello", "streaming": True})
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "audio/wav"
    assert "content-length" not in answer.headers
    assert answer.content == wav_header(None) + expected_pcm("hello", 3)
    samples, rate_hz = soundfile.read(io.BytesIO(answer.content), dtype="int16")
    assert (samples.tobytes(), rate_hz) == (expected_pcm("hello", 3), 24_000)


@pytest.mark.parametrize("streaming", [False, True])
def test_an_empty_utterance_is_a_wav_without_samples(streaming):
    with serve(FakeEngine(num_frames=0)) as client:
        answer = client.post("/generate", json={"text": "hello", "streaming": streaming})
    assert answer.status_code == 200
    assert answer.content == wav_file(b"")


@SENDERS
def test_a_request_overrides_the_servers_defaults(send, engine):
    defaults = {"temperature": 0.75, "top_k": 3, "seed": 5, "max_frames": 2}
    with serve(engine, **defaults) as client:
        assert send(client, {"text": "a"}).content == wav_file(
            expected_pcm("a", 2, seed=5, cut=True)
        )
        values = {"text": "b", "speaker": 1, "max_frames": 1, **OVERRIDES}
        assert send(client, values).content == wav_file(
            expected_pcm("b", 1, seed=OVERRIDES["seed"], cut=True)
        )
        for name, value in OVERRIDES.items():
            assert send(client, {"text": "c", name: value}).status_code == 200
    plain, changed, *single = engine.requests
    assert plain.sampling == SamplingParams(temperature=0.75, top_k=3, seed=5)
    assert (plain.speaker, plain.max_frames, plain.context) == (0, 2, None)
    assert changed.sampling == SamplingParams(**OVERRIDES)
    assert (changed.speaker, changed.max_frames) == (1, 1)
    before = {"temperature": 0.75, "top_k": 3, "seed": 5}
    for request, (name, value) in zip(single, OVERRIDES.items(), strict=True):
        assert request.sampling == SamplingParams(**(before | {name: value}))


@SENDERS
def test_a_request_says_whether_its_text_is_normalised(send, engine):
    with serve(engine, normalise="on") as client:
        assert send(client, {"text": "$5"}).status_code == 200
        assert send(client, {"text": "$5", "normalise": "off"}).status_code == 200
        assert send(client, {"text": "$5", "normalise": "maybe"}).status_code == 422
    assert [(r.text, r.normalise) for r in engine.requests] == [("$5", "on"), ("$5", "off")]


def test_every_sampling_parameter_can_be_overridden():
    assert set(SamplingParams.model_fields) <= set(GenerateRequest.model_fields)


def test_null_and_an_empty_form_field_mean_the_default(client, engine):
    names = ["speaker", "streaming", "max_frames", *OVERRIDES]
    assert client.post("/generate", json={"text": "a"} | dict.fromkeys(names)).status_code == 200
    form = {"text": "a"} | dict.fromkeys(names, "")
    assert client.post("/generate", data=form).status_code == 200
    assert [request.sampling for request in engine.requests] == [SamplingParams()] * 2


@SENDERS
@pytest.mark.parametrize("text", SPOKEN)
def test_any_text_is_spoken_as_it_is(send, text, client, engine):
    assert send(client, {"text": text}).status_code == 200
    assert engine.requests[-1].text == text


def test_a_form_in_plain_utf8_as_curl_sends_it(client, engine):
    headers = {"content-type": "application/x-www-form-urlencoded"}
    client.post("/generate", content="text=Grüße+dir&speaker=1".encode(), headers=headers)
    assert (engine.requests[-1].text, engine.requests[-1].speaker) == ("Grüße dir", 1)


@pytest.mark.parametrize(
    "content_type",
    [None, "application/json; charset=utf-8", "application/vnd.api+json", "text/plain",
     "application/x-www-form-urlencoded"],
)  # fmt: skip
def test_json_is_known_by_its_type_or_its_brace(content_type, client, engine):
    headers = {"content-type": content_type} if content_type else {}
    answer = client.post("/generate", content=b' {"text": "hello"}', headers=headers)
    assert answer.status_code == 200
    assert engine.requests[-1].text == "hello"


WRONG = {
    "text": ["", " ", "\n\t \u3000", 5, True, ["a"], {"a": 1}, "\ud800", "ok \udfff"],
    "speaker": [2, -1, 1.5, 1.0, True, "0", "one", 10**30, [0], {}],
    "streaming": ["yes", 1, 0, "true", [], 2.5],
    "temperature": [-0.1, 101, "hot", "0.5", True, 10**400, [0.5], {}],
    "top_k": [-1, 1.5, 2**31, 10**30, "5", True, [5]],
    "top_p": [0, -0.5, 1.01, 2, "1", [1]],
    "min_p": [-0.01, 1.01, "0", None.__class__.__name__],
    "repetition_penalty": [0, -1, 1e9, "1", {}],
    "repetition_window": [0, -1, 2049, 1.5, "4"],
    "seed": [2**63, -(2**63) - 1, 1.5, "7", True, 10**5000],
    "max_frames": [0, -1, 2049, 10**30, 2.5, "3"],
    "temprature": [0.5],
    "x" * 1000: [1],
}


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name, values in WRONG.items() for value in values],
    ids=lambda item: ascii(item)[:20] if not isinstance(item, int) or item < 10**20 else "huge",
)
def test_a_wrong_value_is_422_and_named(name, value, client):
    if value == 10**5000:  # longer than Python's own limit on digits
        body = b'{"text": "a", "seed": 1' + b"0" * 5000 + b"}"
        assert_refused(client.post("/generate", content=body), 400, "digits")
    else:
        body = json.dumps({"text": "a", name: value})
        assert_refused(client.post("/generate", content=body), 422, name[:100])
    assert client.post("/generate", json={"text": "next"}).status_code == 200


def test_a_name_that_is_not_text_is_422(client):
    assert_refused(client.post("/generate", content=rb'{"text": "a", "\ud800": 1}'), 422)


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize("name", ["temperature", "top_k", "top_p", "seed", "speaker", "text"])
def test_nan_and_infinity_are_422_and_named(name, value, client):
    body = f'{{"text": "a", "{name}": {value}}}'
    assert_refused(client.post("/generate", content=body), 422, name)


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", "nan"), ("temperature", "inf"), ("temperature", "-1"), ("top_k", "1.5"),
     ("top_p", "half"), ("speaker", "2"), ("speaker", "true"), ("speaker", "1.5"),
     ("seed", str(2**63)), ("max_frames", "0"), ("streaming", "maybe"), ("unknown", "1"),
     ("text", " ")],
)  # fmt: skip
@pytest.mark.parametrize("send", [as_urlencoded, as_multipart])
def test_a_wrong_form_value_is_422_and_named(send, name, value, client):
    assert_refused(send(client, {"text": "a", name: value}), 422, name)


def test_thousands_of_wrong_fields_get_a_short_answer(client):
    answer = client.post("/generate", json=dict.fromkeys(map(str, range(10_000)), 1))
    assert_refused(answer, 422, "64 fields")


@pytest.mark.parametrize("body", [{}, {"text": None}, {"speaker": 0}])
def test_missing_text_is_422(body, client):
    assert_refused(client.post("/generate", json=body), 422, "text")
    assert_refused(as_multipart(client, {"speaker": 0}), 422, "text")
    assert_refused(as_urlencoded(client, {"speaker": 0}), 422, "text")


@pytest.mark.parametrize(
    ("content", "status_code"),
    [(b"", 400), (b"{", 400), (b'{"text": "a"', 400), (b"nonsense", 400), (b"\xff\xfe{", 400),
     (b'{"text": "\xff"}', 400), (b"[" * 100_000, 400), (b'{"text": ' * 10_000, 400),
     (b"[]", 422), (b'"text"', 422), (b"5", 422), (b"null", 422), (b"NaN", 422),
     (b'[{"text": "a"}]', 422)],
    ids=lambda item: repr(item)[:24],
)  # fmt: skip
def test_broken_json_is_refused(content, status_code, client):
    headers = {"content-type": "application/json"}
    assert_refused(client.post("/generate", content=content, headers=headers), status_code)
    assert client.post("/generate", json={"text": "next"}).status_code == 200


@pytest.mark.parametrize(
    ("body", "name"),
    [
        ('{"text": "a", "text": "b"}', "'text'"),
        ('{"text": "a", "seed": null, "seed": 1}', "'seed'"),
        ('{"text": "a", "x": {"deep": 1, "deep": 1}}', "'deep'"),
        (r'{"text": "a", "te\u0078t": "b"}', "'text'"),
        (r'{"\ud800": 1, "text": "a", "\ud800": 1}', "ud800"),
        (f'{{"{"x" * 5000}": 1, "{"x" * 5000}": 1}}', "xxxx"),
    ],
)
def test_a_key_given_twice_is_422_and_named(body, name, client):
    assert_refused(client.post("/generate", content=body), 422, name)


@pytest.mark.parametrize(
    ("content_type", "content", "status_code"),
    [
        ("text/plain", b"hello", 415),
        ("audio/wav", b"RIFF", 415),
        ("application/x-www-form-urlencoded", b"text=%ff", 400),
        ("application/x-www-form-urlencoded", b"text=\xff", 400),
        ("application/x-www-form-urlencoded", b"text=a&text=b", 422),
        ("application/x-www-form-urlencoded", b"&".join([b"a=1"] * 100), 400),
        ("application/x-www-form-urlencoded", b"", 422),
        ("multipart/form-data", b"no boundary", 400),
        ("multipart/form-data; boundary=x", b"no boundary", 400),
        ("multipart/form-data; boundary=x", b"--x\r\n\r\nno name\r\n--x--\r\n", 400),
        (
            "multipart/form-data; boundary=x",
            b'--x\r\nContent-Disposition: form-data; name="text"; filename="a.txt"\r\n\r\n'
            b"hello\r\n--x--\r\n",
            400,
        ),
        *(
            (
                f"multipart/form-data; boundary=x; charset={charset}",
                b'--x\r\nContent-Disposition: form-data; name="text"\r\n\r\nxn--\xff-\r\n--x--\r\n',
                400,
            )
            for charset in ("undefined", "punycode")
        ),
    ],
)
def test_a_broken_form_is_refused(content_type, content, status_code, client):
    headers = {"content-type": content_type}
    assert_refused(client.post("/generate", content=content, headers=headers), status_code)
    assert client.post("/generate", json={"text": "next"}).status_code == 200


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("text", ["x" * 2_000_000, "\u00e9" * 1_000_000])
def test_two_megabytes_are_413(text, chunked, client):
    bodies = [
        ("application/json", json.dumps({"text": text}).encode()),
        ("application/x-www-form-urlencoded", urlencode({"text": text}).encode()),
    ]
    for content_type, body in bodies:
        pieces = (body[i : i + 65_536] for i in range(0, len(body), 65_536))
        headers = {"content-type": content_type}
        answer = client.post("/generate", content=pieces if chunked else body, headers=headers)
        assert_refused(answer, 413, "262144")
    assert client.post("/generate", json={"text": "next"}).status_code == 200


@SENDERS
def test_the_longest_text_is_a_setting(send):
    engine = FakeEngine()
    with serve(engine, max_text_chars=10) as client:
        assert send(client, {"text": "x" * 10}).status_code == 200
        assert_refused(send(client, {"text": "x" * 11}), 422, "at most 10 characters, got 11")
    assert [request.text for request in engine.requests] == ["x" * 10]


@SENDERS
@pytest.mark.parametrize(
    ("settings", "default", "limit"),
    [
        ({"max_frames": 5}, 5, 5),
        ({"max_frames": 5, "max_frames_limit": 7}, 5, 7),
        ({"max_frames_limit": 7}, 7, 7),
        ({"max_frames": 9, "max_frames_limit": 7}, 7, 7),
        ({}, frames_bound("a"), 2048),
        ({"max_silence_s": 0.0}, 1125, 2048),
    ],
)
def test_the_most_frames_are_a_limit_beside_the_default(send, settings, default, limit):
    engine = FakeEngine(num_frames=0)
    with serve(engine, **settings) as client:
        assert send(client, {"text": "a"}).status_code == 200
        assert send(client, {"text": "a", "max_frames": limit}).status_code == 200
        assert_refused(send(client, {"text": "a", "max_frames": limit + 1}), 422, "max_frames")
    assert [request.max_frames for request in engine.requests] == [default, limit]


def test_a_text_beyond_the_context_is_422_with_the_numbers(client):
    for streaming in (False, True):
        answer = client.post("/generate", json={"text": "x" * 5000, "streaming": streaming})
        assert_refused(answer, 422, "takes 5000 of 2000")
    assert client.post("/generate", json={"text": "next"}).status_code == 200


def test_other_routes_and_methods_are_json_errors(client):
    assert_refused(client.get("/generate"), 405)
    assert_refused(client.get("/nothing"), 404)
    assert_refused(client.post("/health"), 405)


def test_a_bug_in_the_engine_is_a_json_error_and_no_more(client):
    answer = client.post("/generate", json={"text": "crash"})
    assert_refused(answer, 500, "internal error")
    assert "a bug in add" not in answer.text
    assert client.get("/health").status_code == 200
    assert client.post("/generate", json={"text": "next"}).status_code == 200


def test_health_says_what_is_true(client):
    answer = client.get("/health")
    assert answer.status_code == 200
    assert answer.json() == {
        "status": "ok",
        **DESCRIPTION,
        "live_requests": 0,
        "waiting_requests": 0,
        "unread_bytes": 0,
        "cache": {"pages": 0},
        "step_ms": {"rows": {}, "prompt_tokens": {}, "measured_over_predicted": []},
        "max_queue_size": 64,
        "defaults": SpeechSettings().model_dump(),
        "counts": {
            "finished": {},
            "cancelled": 0,
            "failed": 0,
            "non_finite": 0,
            "refused": 0,
            "stalled": 0,
            "recoveries": 0,
        },
    }


@pytest.mark.parametrize("path", ["/health", "/health/live", "/health/ready", "/docs", "/nothing"])
def test_head_is_get_without_the_body(path, client):
    headers = {"X-Request-Id": "same"}
    got, head = client.get(path, headers=headers), client.head(path, headers=headers)
    assert head.status_code == got.status_code
    assert {**head.headers, "date": ""} == {**got.headers, "date": ""}
    assert head.content == b""
    assert client.head("/generate").status_code == 405


def test_readiness_fails_with_a_reason_and_liveness_stays():
    engine = FakeEngine(fail_at_step=1)
    engine.reset = None  # calling it raises
    with serve(engine) as client:
        assert client.get("/health/ready").json() == {"status": "ready"}
        client.post("/generate", json={"text": "a"})
        ready = client.get("/health/ready")
        assert ready.status_code == 503
        assert ready.json()["status"] == "failed"
        assert ready.json()["reason"]
        assert client.get("/health/live").status_code == 200


@pytest.mark.parametrize("streaming", [False, True])
def test_a_step_that_fails_before_the_first_frame_is_repeated(streaming):
    engine = FakeEngine(fail_at_step=1)
    with serve(engine) as client:
        body = {"text": "a", "streaming": streaming}
        assert client.post("/generate", json=body).content[44:] == expected_pcm("a", 3)
        health = client.get("/health")
        assert health.status_code == 200
        assert health.json()["counts"]["recoveries"] == 1
    assert engine.num_resets == 1


@pytest.mark.parametrize("streaming", [False, True])
def test_an_engine_that_cannot_start_again_is_503_from_then_on(streaming):
    engine = FakeEngine(fail_at_step=1)
    engine.reset = None  # calling it raises
    with serve(engine) as client:
        assert client.get("/health").status_code == 200
        body = {"text": "a", "streaming": streaming}
        for _ in range(2):
            answer = client.post("/generate", json=body)
            assert_refused(answer, 503, "the engine failed")
            assert "broke" not in answer.text
        health = client.get("/health")
        assert health.status_code == 503
        assert health.json()["status"] == "failed"
        assert health.json()["reason"] == "the engine failed"


def test_openapi_describes_the_request(client):
    operation = client.get("/openapi.json").json()["paths"]["/generate"]["post"]
    content = operation["requestBody"]["content"]
    assert set(content) == {
        "application/json",
        "application/x-www-form-urlencoded",
        "multipart/form-data",
    }
    properties = content["application/json"]["schema"]["properties"]
    own = {"text", "speaker", "voice", "streaming", "max_frames", "normalise"}
    own |= {"context", "conversation", "format", "sample_rate", "speed"}
    assert set(properties) == own | set(OVERRIDES)
    assert properties["top_p"]["anyOf"][0] == {
        "type": "number", "exclusiveMinimum": 0, "maximum": 1,
    }  # fmt: skip
    assert "audio/wav" in operation["responses"]["200"]["content"]
    assert client.get("/docs").status_code == 200
