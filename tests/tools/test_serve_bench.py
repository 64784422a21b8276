"""The serve bench: playback, arrivals, and a client of a fake server. Nothing is timed."""

import asyncio
import json
import math
import statistics
import struct
from collections.abc import Awaitable, Callable
from itertools import islice, pairwise

import arrivals
import bench_serve
import pytest
import serve_cases
import speech_load
from arrivals import MIX, PARAGRAPH_CHARS, Arrival
from playback import Playback, audio_between, heard_at, percentile, play
from serve_cases import Plan, capacity_of
from speech_client import Dechunker, Stream, Target, speak, wav_layout

from vox_serve.audio import wav_header

FRAME = struct.pack("<h", 1000) * 1920
SILENCE = bytes(3840)


def test_chunks_that_come_in_time_leave_no_gap():
    assert play([(5.0, 0.08), (5.05, 0.08), (5.16, 0.08)]) == Playback(
        pytest.approx(0.24), 0, 0, 0.0, pytest.approx(0.0)
    )


def test_a_chunk_after_the_end_of_the_audio_is_an_underrun():
    """Playback goes on when it comes: later chunks are measured against the shifted end."""
    chunks = [(1.0, 0.1), (1.3, 0.1), (1.35, 0.1), (1.75, 0.1)]
    played = play(chunks)
    assert (played.underruns, played.audio_s) == (2, pytest.approx(0.4))
    assert played.gap_s == pytest.approx(0.2 + 0.25)
    assert played.longest_gap_s == pytest.approx(0.25)
    assert played.least_slack_s == pytest.approx(-0.25)


def test_audio_that_is_ahead_makes_up_for_a_late_chunk():
    assert play([(0.0, 1.0), (0.1, 1.0), (1.9, 1.0)]).underruns == 0
    assert play([(0.0, 1.0), (0.1, 1.0), (2.1, 1.0)]).gap_s == pytest.approx(0.1)


def test_a_stream_without_a_second_chunk_has_no_slack():
    assert play([]) == Playback(0.0, 0, 0, 0.0, math.inf)
    assert play([(3.0, 0.5)]).least_slack_s == math.inf


def test_audio_is_heard_after_the_gaps_before_it():
    chunks = [(1.0, 0.1), (1.3, 0.1), (1.35, 0.1)]
    assert heard_at(chunks, 0.05) == pytest.approx(1.05)
    assert heard_at(chunks, 0.15) == pytest.approx(1.35)
    assert heard_at(chunks, 0.25) == pytest.approx(1.45)
    with pytest.raises(ValueError, match="ends before"):
        heard_at(chunks, 0.31)


def test_audio_between_counts_arrivals_from_start_to_before_end():
    assert audio_between([(1.0, 1), (2.0, 2), (3.0, 4)], 2.0, 3.0) == 2


def test_percentiles_are_values_that_occurred():
    values = [5.0, 1.0, 4.0, 2.0, 3.0]
    assert [percentile(values, p) for p in (0, 20, 50, 95, 100)] == [1, 1, 3, 5, 5]
    assert percentile(list(range(1, 101)), 95) == 95
    assert percentile([], 50) is None


def test_requests_are_the_same_for_a_seed_and_ten_hold_the_mix():
    first = list(islice(arrivals.requests(3), 200))
    assert first == list(islice(arrivals.requests(3), 200))
    assert first != list(islice(arrivals.requests(4), 200))
    for start in range(0, 200, 10):
        kinds = [request.kind for request in first[start : start + 10]]
        assert {kind: kinds.count(kind) for kind in MIX} == MIX
    assert [request.seed for request in first] == list(range(200))
    # Equal texts would share their prompt's pages.
    assert len({request.text for request in first}) > 190


def test_texts_are_of_the_length_of_their_kind():
    texts = {kind: [] for kind in MIX}
    for request in islice(arrivals.requests(0), 500):
        texts[request.kind].append(request.text)
        assert request.text[0].isupper()
        assert request.text[-1] in ".?"
    mean = {kind: statistics.mean(map(len, found)) for kind, found in texts.items()}
    assert mean["turn"] < mean["sentences"] < mean["paragraph"]
    assert max(map(len, texts["paragraph"])) <= PARAGRAPH_CHARS
    assert min(map(len, texts["paragraph"])) > 0.7 * PARAGRAPH_CHARS


def test_a_poisson_process_has_its_rate_and_a_rates_times_scale():
    times = arrivals.poisson(5.0, 2000, seed=1)
    assert times == sorted(times)
    assert len(times) == pytest.approx(10_000, rel=0.04)
    gaps = [b - a for a, b in pairwise(times)]
    assert statistics.stdev(gaps) == pytest.approx(0.2, rel=0.05)
    assert arrivals.poisson(10.0, 1000, seed=1) == pytest.approx([t / 2 for t in times])


def test_bursts_come_together_at_the_same_mean_rate():
    times = arrivals.bursts(5.0, 4000, seed=1, size=8)
    assert len(times) == pytest.approx(20_000, rel=0.06)
    assert all(len({*times[i : i + 8]}) == 1 for i in range(0, len(times), 8))


def test_requests_at_times_keep_their_order_and_texts():
    load = arrivals.at_times([0.5, 0.75], seed=2)
    plain = list(islice(arrivals.requests(2), 2))
    assert [(r.at_s, r.text, r.seed) for r in load] == [
        (0.5, plain[0].text, 0),
        (0.75, plain[1].text, 1),
    ]


@pytest.mark.parametrize("piece", [1, 2, 3, 7, 100])
def test_chunked_framing_is_removed_wherever_the_pieces_end(piece):
    framed = b"5\r\nhello\r\n1;x=y\r\n \r\n0a\r\n0123456789\r\n0\r\n\r\n"
    dechunker = Dechunker()
    body = b"".join(dechunker.feed(framed[i : i + piece]) for i in range(0, len(framed), piece))
    assert body == b"hello 0123456789"
    assert dechunker.ended


def test_wrong_framing_is_an_error():
    with pytest.raises(ValueError, match="invalid literal"):
        Dechunker().feed(b"hello\r\n")


def test_samples_of_a_wav_begin_after_its_data_chunks_head():
    header = wav_header(None, 16_000)
    assert wav_layout(header) == (44, 16_000)
    assert all(wav_layout(header[:n]) is None for n in range(44))
    extra = header[:36] + struct.pack("<4sI", b"LIST", 3) + b"abc\0" + header[36:]
    assert wav_layout(extra) == (56, 16_000)
    with pytest.raises(ValueError, match="no WAV"):
        wav_layout(b"ID3 ")
    with pytest.raises(ValueError, match="2 channels"):
        wav_layout(header[:22] + b"\2\0" + header[24:])


Handler = Callable[[dict, asyncio.StreamWriter], Awaitable[None]]


async def _with_server(handler: Handler, use: Callable[[str], Awaitable[list[Stream]]]):
    """The streams of `use`, given the URL of a server that answers requests with `handler`."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length:")[1].split()[0])
        await handler(json.loads(await reader.readexactly(length)), writer)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        return await use(f"http://127.0.0.1:{port}")


def _run(handler: Handler, *requests: Arrival, path: str = "") -> list[Stream]:
    async def use(url: str) -> list[Stream]:
        target = Target(url + path, timeout_s=20)
        return await speech_load.together(target, requests)

    return asyncio.run(_with_server(handler, use))


def _chunked(writer: asyncio.StreamWriter, *pieces: bytes, end: bool = True) -> None:
    writer.write(
        b"HTTP/1.1 200 OK\r\nContent-Type: audio/wav\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    for piece in pieces:
        writer.write(b"%x\r\n%s\r\n" % (len(piece), piece))
    if end:
        writer.write(b"0\r\n\r\n")


HELLO = Arrival(0.0, "Hello.", 7, "short")


def test_the_client_reads_a_streamed_wav():
    asked = []

    async def handler(body, writer):
        asked.append(body)
        click = struct.pack("<h", 500) + SILENCE[2:]
        _chunked(writer, wav_header(None) + click, SILENCE[:961], b"\0" + FRAME)

    (stream,) = _run(handler, HELLO)
    assert asked == [{"text": "Hello.", "seed": 7, "streaming": True}]
    assert (stream.status, stream.complete, stream.problem) == (200, True, None)
    assert stream.playback.audio_s == pytest.approx(0.08 + 962 / 48_000 + 0.08)
    assert stream.audible_offset_s == pytest.approx(0.1)
    assert stream.sent_s <= stream.answer_s <= stream.chunks[0][0] <= stream.end_s
    assert stream.audible_s >= stream.first_audio_s + 0.1 - 1e-9


def test_the_client_reads_a_whole_wav_and_raw_pcm_of_an_openai_route():
    asked = []

    async def handler(body, writer):
        asked.append(body)
        pcm = "input" in body
        kind = b"audio/pcm" if pcm else b"audio/wav"
        content = FRAME if pcm else wav_header(len(FRAME)) + FRAME
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: %s\r\n" % kind)
        writer.write(b"\r\n" if pcm else b"Content-Length: %d\r\n\r\n" % len(content))
        writer.write(content)

    whole = Arrival(0.0, "Hello.", 7, "whole", streaming=False)
    (wav,) = _run(handler, whole)
    (pcm,) = _run(handler, HELLO, path="/v1/audio/speech")
    assert asked[0]["streaming"] is False
    assert asked[1] == {"input": "Hello.", "response_format": "pcm", "stream": True}
    assert wav.complete
    assert pcm.complete
    assert wav.digest == pcm.digest
    assert wav.playback.audio_s == pcm.playback.audio_s == pytest.approx(0.08)


def test_refused_cut_broken_and_empty_answers_are_told_apart():
    async def handler(body, writer):
        kind = body["seed"]
        if kind == 0:
            writer.write(b"HTTP/1.1 429 Too Many\r\nContent-Length: 2\r\n\r\n{}")
        elif kind == 1:
            _chunked(writer, wav_header(None) + FRAME, end=False)
        elif kind == 2:
            writer.write(b"HTTP/1.1 500 Oh\r\nContent-Length: 0\r\n\r\n")
        elif kind == 3:
            _chunked(writer, b"no sound at all")
        elif kind == 4:
            _chunked(writer)
        else:
            _chunked(writer, wav_header(None) + FRAME)

    streams = _run(handler, *(Arrival(0.0, "x", seed, "short") for seed in range(6)))
    assert [s.refused for s in streams] == [True] + [False] * 5
    assert [s.complete for s in streams] == [False] * 5 + [True]
    problems = [s.problem for s in streams]
    assert problems == [
        *(None, "cut", "status 500", "malformed answer: no WAV", "no audio", None),
    ]
    figures = speech_load.figures(streams, 0.0, 1.0)
    assert (figures["streams"], figures["complete"]) == (6, 1)
    assert (figures["refused"], figures["failed"]) == (1, 4)
    assert speech_load.problems([*streams, streams[1]])[0] == "2 x cut"


def test_a_server_that_does_not_listen_is_a_problem():
    async def use(url: str) -> list[Stream]:
        return [await speak(Target("http://127.0.0.1:9"), HELLO)]

    (stream,) = asyncio.run(_with_server(None, use))
    assert stream.problem.startswith("no connection")
    assert stream.has_begun.is_set()


def _stream(due_s: float, chunks: list, **more) -> Stream:
    stream = Stream(Arrival(0.0, "x", 0, "turn"), due_s)
    stream.chunks, stream.status, stream.complete = chunks, 200, True
    for name, value in more.items():
        setattr(stream, name, value)
    return stream


def test_figures_of_a_load():
    """Goodput counts streams without a gap, as far as they came while requests arrived."""
    streams = [
        _stream(10.0, [(10.1, 1.0), (10.5, 1.0)], audible_offset_s=0.25),
        _stream(10.0, [(10.3, 1.0), (12.0, 1.0)]),  # a gap of 0.7 s
        _stream(11.0, [(11.2, 1.0), (12.1, 3.0)]),
        _stream(11.0, [], status=429, complete=False, sent_s=11.0, answer_s=11.004),
    ]
    figures = speech_load.figures(streams, 10.0, 2.0)
    assert figures["first p50"] == pytest.approx(200)
    assert figures["first p95"] == figures["first most"] == pytest.approx(300)
    assert figures["audible p50"] == pytest.approx(350)
    assert (figures["with gaps"], figures["gaps"]) == (1, 1)
    assert figures["gap ms"] == figures["longest gap ms"] == pytest.approx(700)
    assert figures["goodput x"] == pytest.approx((2.0 + 1.0) / 2)
    assert figures["goodput/s"] == pytest.approx((1.0 + 0.25) / 2)
    assert (figures["refused"], figures["failed"]) == (1, 0)
    assert figures["refused p95"] == pytest.approx(4)


def test_throughput_leaves_out_the_warm_up_and_the_end():
    streams = [_stream(0.0, [(0.5, 1.0), (1.5, 1.0), (4.5, 2.0)]), _stream(2.0, [(3.0, 2.0)])]
    assert speech_load.throughput(streams, 0.0, 1.0, 4.0) == pytest.approx((1.0, 1.0 / 3.0))
    assert speech_load.throughput([], 0.0, 1.0, 4.0) == (0.0, 0.0)


def test_capacity_is_the_most_audio_without_a_gap():
    rows = [
        {"streams/s": 2.0, "audio s/s": 8.0, "with gaps": 0},
        {"streams/s": 3.0, "audio s/s": 12.0, "with gaps": 1},
        {"streams/s": 2.5, "audio s/s": 10.0, "with gaps": 0},
    ]
    assert capacity_of(rows) == (2.5, True)
    assert capacity_of(rows[1:2]) == (3.0, False)
    with pytest.raises(ValueError, match="no stream"):
        capacity_of([{"streams/s": 0.0}])


def test_answers_to_equal_requests_must_have_equal_samples():
    samples = speech_load.Samples()
    streams = [_stream(0, [(0, 1)], digest="a"), _stream(0, [(0, 1)], digest="a")]
    assert samples.differing(streams) == 0
    cut = _stream(0, [(0, 1)], digest="c", complete=False)
    assert samples.differing([_stream(0, [(0, 1)], digest="b"), cut]) == 1


def test_records_hold_times_texts_and_frames():
    streams = [
        _stream(11.0, [], status=429, complete=False, end_s=11.5),
        _stream(10.25, [(10.5, 0.08), (10.7, 0.16)], end_s=11.25),
    ]
    heard, refused = speech_load.recorded(streams, 10.0)
    assert (heard["at_s"], heard["text"], heard["frames"]) == (0.25, "x", 3)
    assert (heard["first_audio_s"], heard["end_s"]) == (0.25, 1.0)
    assert (heard["underruns"], heard["gap_s"]) == (1, pytest.approx(0.12))
    assert (refused["at_s"], refused["status"], refused["frames"]) == (1.0, 429, None)


def test_frames_of_refused_requests_come_from_equal_ones_or_from_the_length():
    def request(text: str, seed: int, frames: int | None) -> dict:
        return {"text": text, "seed": seed, "frames": frames}

    requests = [
        *(request("abcd", 0, 12), request("abcdefgh", 1, 12)),
        *(request("abcd", 0, None), request("abcd", 2, None), request("abcdefgh", 3, None)),
    ]
    speech_load.fill_in_frames(requests)
    assert [r["frames"] for r in requests] == [12, 12, 12, 8, 16]
    how = [r["frames_from"] for r in requests]
    assert how == ["speech", "speech", "equal request", "length", "length"]
    speech_load.fill_in_frames(refused := [request("abcd", 0, None)])
    assert (refused[0]["frames"], refused[0]["frames_from"]) == (None, "unknown")


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        (["--cases", "poison"], "no poison"),
        (["--cases", "poisson"], "add --capacity"),
        (["--url", "http://x:1", "--policy", "fifo"], "leave out --policy"),
        (["--repeat", "0"], "--repeat"),
    ],
)
def test_wrong_options_are_refused(argv, problem, capsys):
    with pytest.raises(SystemExit):
        bench_serve.parse(argv)
    assert problem in capsys.readouterr().err


@pytest.mark.slow
def test_every_case_runs_against_a_fake_server(tmp_path, monkeypatch):
    """Two runs of each case, on a server that refuses every tenth request."""

    async def handler(body, writer):
        if body["seed"] % 10 == 9 and body["seed"] < 1_000_000:
            writer.write(b"HTTP/1.1 429 Too Many\r\nContent-Length: 0\r\n\r\n")
        else:
            _chunked(writer, wav_header(None) + FRAME * (1 + len(body["text"]) // 40))

    monkeypatch.setattr(serve_cases, "WHOLE_EVERY_S", 0.2)
    monkeypatch.setattr(serve_cases, "BESIDE_PAUSE_S", 0.0)
    plan = Plan(seconds=0.4, capacity_seconds=0.1, at_once=(1, 2), loads=(1.0,))
    report = bench_serve.Report()
    cases = list(bench_serve.CASES)

    async def use(url: str) -> list[Stream]:
        server = bench_serve.Server("fake", Target(url))
        await bench_serve.measure([server], cases[:2], plan, 2, report)
        assert plan.capacity > 0
        assert plan.quiet_ms > 0
        plan.capacity = 75.0
        await bench_serve.measure([server], cases[2:], plan, 2, report)
        return []

    asyncio.run(_with_server(handler, use))
    results = json.loads(report.json())
    assert "left out" not in results
    assert {*cases, *(f"{case}: medians" for case in cases)} <= results.keys()
    assert [len(results[case]) for case in cases] == [2, 4, 2, 2, 2, 2, 2]
    poisson = results["poisson"][0]
    assert poisson["complete"] + poisson["refused"] == poisson["streams"] > 20
    assert poisson["refused"] == poisson["streams"] // 10
    assert poisson["p95 / quiet"] > 0
    assert (poisson["with gaps"], poisson["failed"], poisson["differ"]) == (0, 0, 0)
    whole = results["whole-under-load: medians"][0]
    assert whole["whole"] == whole["whole complete"] == 2
    assert {record["case"] for record in plan.records} == set(cases)
    bench_serve.write_record(tmp_path / "record.json", plan, report)
    loads = json.loads((tmp_path / "record.json").read_text())["loads"]
    requests = [request for load in loads for request in load["requests"]]
    assert {request["frames_from"] for request in requests} == {"speech", "length"}
    assert all(request["frames"] > 0 for request in requests)
