"""A long text of which a later part is refused: no fault of the engine."""

import asyncio

import pytest

from fake_engine import FakeEngine, expected_pcm
from runner_testing import read_job, run_with
from vox_serve.engine import FrameOutput, Request
from vox_serve.job import Job, RequestFailed, RequestRefused


async def whole(job: Job) -> bytes:
    with job:
        await job.finished()
        return b"".join([chunk async for chunk in job])


@pytest.mark.parametrize("reason", ["context", "error"])
def test_it_is_refused_if_nothing_was_sent_and_else_a_stream_ends(reason, monkeypatch):
    engine = FakeEngine(num_frames=4, max_batch_size=4)
    speak = engine._next

    def refuse(request: Request, frame: int) -> FrameOutput:
        if request.text != "long" or frame < 2:
            return speak(request, frame)
        del engine._open[request.id]
        return FrameOutput(request.id, None, None, reason, "no room", 1, is_refused=True)

    monkeypatch.setattr(engine, "_next", refuse)

    async def scenario(runner):
        long = runner.submit(Request("long"))
        reads = (
            whole(runner.submit(Request("long"), streaming=False)),
            read_job(long),
            whole(runner.submit(Request("a"), streaming=False)),
        )
        results = await asyncio.gather(*reads, return_exceptions=True)
        assert long.finish_reason == reason
        assert runner.counts.non_finite == 0
        assert runner.counts.finished == {"stop": 1} | ({"context": 1} if is_full else {})
        assert runner.counts.failed == (not is_full)
        return results

    is_full = reason == "context"
    refused, stream, other = run_with(engine, scenario)
    assert isinstance(refused, RequestRefused)
    assert str(refused) == "no room"
    if is_full:
        assert stream == expected_pcm("long", 2)
    else:
        assert isinstance(stream, RequestFailed)
        assert str(stream) == "no room"
    assert other == expected_pcm("a", 4)
