"""Multipart forms: recordings of a context as files, and forms that take long to parse."""

import asyncio
import base64
import json

import pytest
import torch
from fastapi import HTTPException
from fastapi.testclient import TestClient
from starlette.datastructures import Headers

from fake_engine import FakeEngine
from http_testing import assert_refused
from recordings import tone
from vox_serve.api import create_app
from vox_serve.config import Config
from vox_serve.form_io import PIECE_BYTES, read_multipart
from vox_serve.http_io import MAX_CONTEXT_FILES
from vox_serve.runner import Runner

RECORDINGS = [tone(0.5), tone(0.25, 0.4)]
CODES = [[1, 2, 3, 4]]


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def client(engine):
    config = Config()
    with TestClient(create_app(Runner.for_config(engine, config), config, {})) as client:
        yield client


def entry(**speech) -> dict:
    return {"speaker": 1, "text": "Hm?", **speech}


def post(client, context=None, files=RECORDINGS, **fields):
    if context is not None:
        fields["context"] = json.dumps(context)
    parts = [(name, (None, value)) for name, value in ({"text": "hello"} | fields).items()]
    return client.post("/generate", files=parts + [("audio", ("a.wav", file)) for file in files])


def test_files_are_the_recordings_of_a_context(engine, client):
    encoded = [base64.b64encode(recording).decode() for recording in RECORDINGS]
    context = [entry(audio=encoded[0]), entry(codes=CODES), entry(audio=encoded[1])]
    assert client.post("/generate", json={"text": "hello", "context": context}).status_code == 200
    answer = post(client, [entry(), entry(codes=CODES), entry()])
    assert answer.status_code == 200, answer.text
    first, second = (request.context for request in engine.requests)
    assert len(second) == 3
    for a, b in zip(first, second, strict=True):
        assert (a.speaker, a.text) == (b.speaker, b.text)
        assert torch.equal(a.codes, b.codes)


def test_files_may_be_longer_than_other_bodies(engine, client):
    assert post(client, [entry()], [tone(seconds=15)]).status_code == 200
    assert len(engine.requests[0].context[0].codes) > 100
    answer = client.post(
        "/generate", files=[("text", (None, "a")), ("other", ("a", tone(seconds=15)))]
    )
    assert_refused(answer, 413)


@pytest.mark.parametrize(
    ("context", "files", "says"),
    [
        ([entry()], RECORDINGS, "2 files audio, and context has 1 segments"),
        ([entry(), entry()], RECORDINGS[:1], "1 files audio, and context has 2 segments"),
        ([entry(codes=CODES)], RECORDINGS[:1], "has 0 segments"),
        (None, RECORDINGS[:1], "has 0 segments"),
        (["x"], RECORDINGS[:1], "has 0 segments"),
        ({}, RECORDINGS[:1], "must be a list"),
        ([entry()], [], "context[0]: give either audio or codes"),
        ([entry()], [b""], "context[0].audio must be a recording"),
        ([entry()], [b"junk"], "context[0].audio: "),
        ([{"speaker": 1}], RECORDINGS[:1], "context[0].text"),
    ],
    ids=str,
)
def test_files_that_do_not_fit_the_context_are_refused(client, context, files, says):
    assert_refused(post(client, context, files), 422, says)


def test_a_form_with_files_has_the_rules_of_other_forms(client):
    assert_refused(post(client, [entry()], RECORDINGS[:1], conversation="a"), 422, "either context")
    assert_refused(post(client, [entry()], RECORDINGS[:1], audio="x"), 422, "more than once")
    assert_refused(post(client, None, [], audio="x"), 422, "audio")
    assert_refused(post(client, [entry()], [b"a"] * (MAX_CONTEXT_FILES + 1)), 400, "files")
    assert_refused(client.post("/generate", files={"text": ("a.txt", b"hello")}), 400, "text")
    assert_refused(client.post("/generate", json={"text": "a", "audio": []}), 422, "audio")


HEAD = b'--bbbb\r\nContent-Disposition: form-data; name="a"; filename="x"\r\n\r\n'


def read(body: bytes):
    """The parts of a body, and the turns that the event loop gave to others meanwhile."""

    async def stream():
        yield body

    async def main():
        turns, done = 0, False

        async def count() -> None:
            nonlocal turns
            while not done:
                turns += 1
                await asyncio.sleep(0)

        counting = asyncio.create_task(count())
        headers = Headers({"content-type": "multipart/form-data; boundary=bbbb"})
        try:
            return await read_multipart(headers, stream(), len(body), 1), turns
        finally:
            done = True
            await counting

    return asyncio.run(main())


def test_others_get_a_turn_between_the_pieces_of_a_form():
    data = b"\r\n--bbb" * (40 * PIECE_BYTES // 7)
    parts, turns = read(HEAD + data + b"\r\n--bbbb--\r\n")
    assert parts == [("a", data)]
    assert turns >= 39


@pytest.mark.parametrize("after", [b"", b"x", b"-", b"\r"])
def test_what_looks_like_many_delimiters_is_refused(after):
    """The parser takes 190 ms for a MiB of them."""
    with pytest.raises(HTTPException) as refused:
        read(HEAD + (b"\r\n--bbbb" + after) * 100_000)
    assert refused.value.status_code == 400


def test_a_form_may_have_as_many_parts_as_fields_and_files():
    field = b'\r\n--bbbb\r\nContent-Disposition: form-data; name="f"\r\n\r\nv'
    parts, _ = read(b"\r\n" + HEAD + b"x" + field * 64 + b"\r\n--bbbb--")
    assert len(parts) == 65
