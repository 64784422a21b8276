"""The server with a real engine on a tiny checkpoint: HTTP returns the engine's audio."""

import asyncio
import io
import wave
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from fastapi.testclient import TestClient

from checkpoints import build_tiny
from http_testing import OVERRIDES, SENDERS, SPOKEN, assert_refused
from vox_serve.api import create_app
from vox_serve.audio import pcm16, wav_file
from vox_serve.config import Config
from vox_serve.engine import Engine, Request
from vox_serve.launch import describe
from vox_serve.loading import load_engine
from vox_serve.runner import Runner
from vox_serve.sampling import SamplingParams
from vox_serve.say import speak

NUM_FRAMES = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build_tiny(seed=5).write(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def alone(folder) -> Engine:
    """A second engine, for expected results."""
    return load_engine(str(folder))


@pytest.fixture(scope="module")
def client(folder):
    config = Config(model=str(folder), max_frames=NUM_FRAMES, max_batch_size=3)
    engine = load_engine(config.model, max_batch_size=config.max_batch_size)
    runner = Runner.for_config(engine, config)
    with TestClient(create_app(runner, config, describe(engine, config))) as client:
        yield client


def expected_wav(engine: Engine, text: str, **fields) -> bytes:
    audio, *_ = speak(engine, Request(text, max_frames=NUM_FRAMES, **fields))
    return wav_file(pcm16(audio).tobytes())


@SENDERS
def test_http_returns_the_engines_audio(send, client, alone):
    values = {"text": "Hello there.", "speaker": 1, **OVERRIDES}
    answer = send(client, values)
    assert answer.status_code == 200
    sampling = SamplingParams(**OVERRIDES)
    assert answer.content == expected_wav(alone, "Hello there.", speaker=1, sampling=sampling)
    streamed = send(client, {**values, "streaming": True})
    assert streamed.content[44:] == answer.content[44:]


def test_concurrent_requests_get_the_same_audio_as_alone(client, alone):
    def ask(seed: int) -> bytes:
        body = {"text": f"Number {seed}.", "seed": seed, "streaming": seed % 2 == 0}
        return client.post("/generate", json=body).content[44:]

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, range(8)))
    for seed, answer in enumerate(answers):
        sampling = SamplingParams(seed=seed)
        assert answer == expected_wav(alone, f"Number {seed}.", sampling=sampling)[44:]


@pytest.mark.parametrize("text", SPOKEN)
def test_any_text_is_spoken(text, client):
    assert client.post("/generate", json={"text": text}).status_code == 200


@pytest.mark.parametrize(
    "values",
    [{"temperature": 0}, {"temperature": 1e-300}, {"temperature": 1e-38}, {"temperature": 100},
     {"top_k": 2**31 - 1}, {"top_k": 1}, {"top_k": 0}, {"top_p": 1e-300}, {"min_p": 1},
     {"min_p": 1e-300}, {"repetition_penalty": 100}, {"repetition_penalty": 0.01},
     {"repetition_window": 2048}, {"seed": -(2**63)}, {"seed": 2**63 - 1}],
    ids=str,
)  # fmt: skip
def test_extreme_parameters_are_spoken(values, client):
    answer = client.post("/generate", json={"text": "Hello.", **values})
    assert answer.status_code == 200
    with wave.open(io.BytesIO(answer.content)) as reader:
        assert reader.getnframes() == NUM_FRAMES * 1920
        assert np.frombuffer(reader.readframes(NUM_FRAMES * 1920), "<i2").any()


def test_a_text_beyond_the_context_is_refused_with_the_numbers(client):
    answer = client.post("/generate", json={"text": "word " * 500})
    assert_refused(answer, 422, "256")
    for num_chars in (1023, 1024, 1025, 100_000):
        assert_refused(client.post("/generate", json={"text": "x" * num_chars}), 422, "256")
    assert client.post("/generate", json={"text": "next"}).status_code == 200


def test_health_describes_the_engine(client, folder):
    health = client.get("/health").json()
    assert health["status"] == "ok"
    assert (health["model"], health["device"], health["dtype"]) == (str(folder), "cpu", "float32")
    assert health["backend"] in ("native", "reference")


def test_an_abandoned_job_frees_its_pages(alone):
    async def leave() -> None:
        runner = Runner(alone, max_jobs=4)
        runner.start()
        with runner.submit(Request("Hello there.", max_frames=200)) as job:
            await anext(job)
        await runner.stop()

    free = alone._cache.num_free_pages
    asyncio.run(leave())
    assert not alone.has_work
    assert alone._cache.num_free_pages == free
