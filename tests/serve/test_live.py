"""Text in pieces in, speech out: the WebSocket on a real socket."""

import asyncio
import contextlib
import http.client
import json
import random
import runpy
from pathlib import Path

import pytest

from checkpoints import TinyShape, build_tiny
from fake_engine import ENDLESS, TIMEOUT_S, FakeEngine
from live_client import PATH, live_client
from live_server import LiveServer, wait_until
from vox_serve.growing_text import PIECE_CHARS
from vox_serve.loading import load_engine
from vox_serve.long_form import LongForm
from vox_serve.text.splitting import Part, SentenceStream

SENTENCES = ["Hello there.", "How are you, Dr. No?", "Fine."]
TEXT = " ".join(SENTENCES)
SPLIT_CHARS = 24
FRAME_BYTES = 3840


def serve(engine=None, **settings) -> LiveServer:
    settings = {"split_chars": SPLIT_CHARS} | settings
    return LiveServer(LongForm(engine or FakeEngine(), settings["split_chars"]), **settings)


def call(server: LiveServer, method: str, path: str, **body) -> tuple[int, dict | bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=TIMEOUT_S)
    connection.request(method, path, json.dumps(body), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    is_json = answer.getheader("content-type") == "application/json"
    return answer.status, json.loads(content) if is_json else content


def whole(server: LiveServer, sentences, **fields) -> bytes:
    """Samples of one request with a part for each sentence."""
    status, wav = call(server, "POST", "/generate", text="\n\n".join(sentences), **fields)
    assert status == 200, wav
    return wav[44:]


def waits_for_text(server: LiveServer) -> bool:
    """True if all sentences that have come are spoken."""
    return all(job.is_starved for job in list(server.runner._jobs.values()))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    return build_tiny(TinyShape(max_positions=256), seed=12).write(folder)


def test_words_become_sentences():
    with serve() as server, live_client(server.port) as client:
        client.send("session", seed=5)
        ready = client.event()
        assert ready["conversation"].startswith("live-")
        assert ready | {"conversation": ""} == {
            "type": "ready", "conversation": "", "format": "pcm", "sample_rate": 24000,
            "channels": 1,
        }  # fmt: skip
        client.write(f"{word} " for word in TEXT.split())
        events = client.events("turn.done")
        kinds = [event["type"] for event in events]
        assert kinds == ["sentence.begin", "sentence.end"] * 3 + ["turn.done"]
        for number, text in enumerate(SENTENCES):
            begin, end = events[2 * number : 2 * number + 2]
            assert begin == {
                "type": "sentence.begin", "turn": 1, "sentence": number, "text": text,
                "text_start": TEXT.find(text), "text_end": TEXT.find(text) + len(text),
                "sample_start": number * 3 * 1920,
            }  # fmt: skip
            assert end == {
                "type": "sentence.end", "turn": 1, "sentence": number, "finish_reason": "stop",
                "sample_end": (number + 1) * 3 * 1920,
            }  # fmt: skip
        done = {"type": "turn.done", "turn": 1, "finish_reason": "stop", "samples": 9 * 1920}
        assert events[-1] == done
        assert client.audio[1] == whole(server, SENTENCES, seed=5)


@pytest.mark.parametrize("seed", range(3))
def test_samples_are_those_of_one_request_with_the_same_parts(tiny, seed):
    """A real engine speaks them, whenever the fragments come."""
    source = random.Random(seed)
    engine = load_engine(str(tiny), dtype="float32", max_silence_s=1000.0)
    with serve(engine, max_frames=30, max_frames_limit=40) as server:
        expected = whole(server, SENTENCES, seed=seed, max_frames=40)
        with live_client(server.port) as client:
            client.send("session", seed=seed, max_frames=40)
            rest = TEXT
            while rest:
                size = source.choice([1, 3, 20])
                client.send("text", text=rest[:size])
                rest = rest[size:]
                if source.random() < 0.1:
                    wait_until(lambda: waits_for_text(server))
            client.send("end")
            done = client.events("turn.done")[-1]
            assert done["finish_reason"] == "length"
            assert len(client.audio[1]) == done["samples"] * 2 == 40 * FRAME_BYTES
            assert client.audio[1] == expected


def test_speech_begins_before_the_text_ends():
    with serve() as server, live_client(server.port) as client:
        client.send("text", text="Hello there. How")
        kinds = [event["type"] for event in client.events("sentence.end")]
        assert kinds == ["ready", "sentence.begin", "sentence.end"]
        assert len(client.audio[1]) == 3 * FRAME_BYTES
        assert server.runner.count_jobs() == (1, 0)
        client.send("text", text=" are you")
        client.send("flush")
        events = client.events("sentence.end")
        assert [event.get("text") for event in events] == ["How are you", None]
        client.write(["?"])
        events = client.events("turn.done")
        assert [event.get("text") for event in events] == ["?", None, None]
        wait_until(lambda: server.runner.count_jobs() == (0, 0))


def test_short_sentences_can_be_packed():
    with serve(split_chars=60) as server, live_client(server.port) as client:
        client.send("session", part_chars=40)
        client.write(f"{word} " for word in [*TEXT.split()[:-1], "I am fine, thanks."])
        texts = [e["text"] for e in client.events("turn.done") if e["type"] == "sentence.begin"]
        assert texts == ["Hello there. How are you, Dr. No?", "I am fine, thanks."]


@pytest.mark.parametrize("text", ["", " ", "\n\n \n"])
def test_a_turn_without_text_has_no_samples(text):
    with serve() as server, live_client(server.port) as client:
        done = client.speak([text] if text else [])
        assert done == {"type": "turn.done", "turn": 1, "finish_reason": "stop", "samples": 0}
        assert client.speak(["Yes."])["turn"] == 2


def test_turns_follow_each_other_in_one_conversation():
    engine = FakeEngine()
    with serve(engine) as server, live_client(server.port) as client:
        client.send("session", conversation="call-7", seed=1, speaker=1)
        assert client.event()["conversation"] == "call-7"
        client.write(["Hello there. ", "Bye."])
        client.write(["And now?"])  # while the first one is being spoken
        assert client.events("turn.done")[-1]["turn"] == 1
        assert client.events("turn.done")[-1]["turn"] == 2
        context = engine.requests[-1].context
        assert [segment.text for segment in context] == ["Hello there.", "Bye."]
        assert [segment.speaker for segment in context] == [1, 1]
        turns = call(server, "GET", "/v1/conversations/call-7")[1]["turns"]
        assert [turn["text"] for turn in turns] == ["Hello there.", "Bye.", "And now?"]
        client.send("close")
        with live_client(server.port) as second:  # reconnect
            second.send("session", conversation="call-7")
            second.speak(["Again."])
            assert len(engine.requests[-1].context) == 3


def test_a_conversation_of_its_own_ends_with_the_connection():
    with serve() as server:
        with live_client(server.port) as client:
            client.speak(["Hello."])
            assert len(server.app.state.conversations.kept) == 1
        wait_until(lambda: not len(server.app.state.conversations.kept))
        assert not server.app.state.live.connections


def test_a_session_may_change_between_turns():
    engine = FakeEngine()
    with serve(engine) as server, live_client(server.port) as client:
        client.send("session", seed=1, temperature=0.5)
        client.speak(["One."])
        client.send("init", temperature=None, top_k=7)
        client.speak(["Two."])
        first, second = (request.sampling for request in engine.requests)
        assert (first.seed, first.temperature, first.top_k) == (1, 0.5, 50)
        assert (second.seed, second.temperature, second.top_k) == (1, 0.9, 7)


def heard_turns(server: LiveServer, key: str) -> list[tuple]:
    turns = call(server, "GET", f"/v1/conversations/{key}")[1]["turns"]
    return [(turn["text"], turn["seconds"]) for turn in turns]


@pytest.mark.parametrize("is_over", [False, True])
def test_cancel_keeps_what_was_heard(is_over):
    engine = FakeEngine(num_frames=10)
    with serve(engine) as server, live_client(server.port) as client:
        client.send("session", conversation="a")
        client.write(["One two three four. Five ", "six."], end=is_over)
        client.events("turn.done" if is_over else "sentence.end")
        client.send("cancel", played_ms=400)
        event = client.event()
        assert event == {
            "type": "cancelled", "turn": 1, "heard_ms": 400, "heard_text": "One two three",
            "samples": (20 if is_over else 10) * 1920,
        }  # fmt: skip
        assert heard_turns(server, "a") == [("One two three", 0.4)]
        wait_until(lambda: server.runner.count_jobs() == (0, 0))
        client.speak(["Next."])
        assert [segment.text for segment in engine.requests[-1].context] == ["One two three"]


def test_cancel_ends_speech_in_the_making_and_all_turns_that_wait():
    engine = FakeEngine(num_frames=ENDLESS, step_s=0.002)
    with serve(engine) as server, live_client(server.port) as client:
        client.write(["Hello."])
        client.write(["And."])
        client.write(["So"], end=False)
        client.events("sentence.begin")
        wait_until(lambda: server.runner.count_jobs()[0])
        client.send("cancel")
        first = client.events("cancelled")[-1]
        second, third = client.event(), client.event()
        assert (first["turn"], second["turn"], third["turn"]) == (1, 2, 3)
        assert first["heard_ms"] > 0  # without played_ms all that was sent counts as heard
        assert abs(first["heard_ms"] / 80 - first["samples"] / 1920) <= 1
        assert (second["heard_ms"], third["heard_ms"]) == (0, 0)
        assert engine.saw_abort.wait(TIMEOUT_S)
        wait_until(lambda: server.runner.count_jobs() == (0, 0))
        assert len(engine.requests) == 1


def test_cancel_while_the_turn_before_is_still_played():
    """The next turn is being written, but not spoken yet."""
    with serve(FakeEngine(num_frames=10)) as server, live_client(server.port) as client:
        client.send("session", conversation="a")
        client.speak(["One two."])
        client.write(["Thr"], end=False)
        client.send("cancel", played_ms=80)
        first, second = client.event(), client.event()
        assert (first["turn"], first["heard_ms"]) == (1, 80)
        assert (second["turn"], second["heard_ms"]) == (2, 0)
        assert heard_turns(server, "a") == [("One", 0.08)]


def test_an_interruption_by_http_ends_the_turn():
    engine = FakeEngine(num_frames=ENDLESS, step_s=0.002)
    with serve(engine) as server, live_client(server.port) as client:
        client.send("session", conversation="a")
        client.write(["Hello there. This"], end=False)
        client.events("sentence.begin")
        status, heard = call(server, "POST", "/v1/conversations/a/interrupt", played_ms=80)
        assert (status, heard["heard_s"]) == (200, 0.08)
        done = client.events("turn.done")[-1]
        assert done["finish_reason"] == "interrupted"
        assert client.audio[1][-2:] == b"\0\0"  # it fades
        client.write([" is dropped."])  # the rest of the turn
        engine.num_frames = 3
        client.write(["Next."])
        assert client.events("turn.done")[-1]["turn"] == 2


def test_a_long_message_leaves_the_event_loop_to_others(monkeypatch):
    ticks: list[int] = []
    sizes: list[int] = []
    feed = SentenceStream.feed

    def watched(stream: SentenceStream, fragment: str) -> list[Part]:
        assert len(ticks) == len(sizes)  # other callbacks ran since the last piece
        sizes.append(len(fragment))
        asyncio.get_running_loop().call_soon(ticks.append, 0)
        return feed(stream, fragment)

    with serve() as server, live_client(server.port) as client:
        monkeypatch.setattr(SentenceStream, "feed", watched)
        client.write(["One two three four. " * 40])
        done = client.events("turn.done")[-1]
        assert done["samples"] == 40 * 3 * 1920
        assert sum(sizes) == 800
        assert max(sizes) <= PIECE_CHARS


def test_a_message_without_text_does_not_keep_a_turn():
    with serve(live_text_timeout_s=0.2) as server, live_client(server.port) as client:
        client.write(["Hello there."], end=False)
        kinds: list[str] = []
        for _ in range(500):
            if "turn.done" in kinds:
                break
            client.send("text", text="")
            client.send("flush")
            with contextlib.suppress(TimeoutError):
                if isinstance(message := client.socket.recv(0.02), str):
                    kinds.append(json.loads(message)["type"])
        assert kinds[-1] == "turn.done"


def test_a_turn_without_text_for_long_is_complete():
    with serve(live_text_timeout_s=0.1) as server, live_client(server.port) as client:
        client.write(["Hello there. And"], end=False)
        events = client.events("turn.done")
        assert [e["text"] for e in events if "text" in e] == ["Hello there.", "And"]
        assert events[-1]["timed_out"]
        client.write(["More."])
        assert client.events("turn.done")[-1]["turn"] == 2


def test_a_turn_that_is_fed_a_character_now_and_then_ends(monkeypatch):
    with serve(live_text_timeout_s=0.3) as server, live_client(server.port) as client:
        client.write(["Hello there. "], end=False)
        kinds: list[str] = []
        for _ in range(500):
            if "turn.done" in kinds:
                break
            client.send("text", text="a")
            with contextlib.suppress(TimeoutError):
                if isinstance(message := client.socket.recv(0.05), str):
                    kinds.append(json.loads(message)["type"])
        assert kinds[-1] == "turn.done"
        assert json.loads(message)["timed_out"]
        client.send("end")  # the characters that came since are another turn
        assert client.events("turn.done")[-1]["turn"] == 2


def test_an_unknown_voice_is_an_error_of_the_session():
    with serve() as server, live_client(server.port) as client:
        client.send("session", voice="nobody")
        error = client.event()
        assert (error["type"], error["field"], error["turn"]) == ("error", "voice", None)
        client.send("session", voice="1")
        assert client.event()["type"] == "ready"
        client.send("session", voice="1", speaker=0)
        assert client.event()["field"] == "voice"


def test_get_without_an_upgrade_explains_itself():
    with serve() as server:
        status, answer = call(server, "GET", PATH)
        assert status == 426
        assert "WebSocket" in answer["detail"]


def test_a_client_that_offers_the_protocol_gets_it():
    with serve() as server:
        with live_client(server.port, subprotocols=["voxkern"]) as client:
            assert client.socket.subprotocol == "voxkern"
        with live_client(server.port, subprotocols=["other"]) as client:
            assert client.socket.subprotocol is None


def test_close_ends_the_connection_after_its_turns():
    with serve() as server, live_client(server.port) as client:
        client.write(["Hello there. Bye"], end=False)
        client.send("close")
        client.events("turn.done")
        rest = list(client.socket)
        assert rest == []
        assert client.socket.close_code == 1000


def test_other_formats_are_one_file_for_each_turn():
    with serve() as server, live_client(server.port) as client:
        client.send("session", format="wav", sample_rate=8000, seed=2)
        assert client.event()["sample_rate"] == 8000
        assert client.speak(["Hello. ", "Bye."])["samples"] == 2 * 3 * 640
        first = client.audio[1]
        assert (first[:4], len(first)) == (b"RIFF", 44 + 2 * 2 * 3 * 640)
        client.speak(["Hello. ", "Bye."])
        assert client.audio[2] == first
        client.send("session", format="opus", sample_rate=None)
        client.speak(["Hello."])
        assert client.audio[3].startswith(b"OggS")
        assert client.socket.response.headers["X-Synthetic-Speech"].startswith("AI-generated")


def test_the_example_of_the_documentation():
    """It is in the documentation word for word, and speaks a text."""
    root = Path(__file__).parents[2]
    path = root / "examples" / "live_text.py"
    source = path.read_text()
    example = source[source.index("import asyncio") : source.index("async def words")].strip()
    assert example in (root / "docs" / "live.md").read_text()
    module = runpy.run_path(str(path))

    async def words():
        for word in TEXT.split():
            yield f"{word} "

    async def speak(url: str) -> bytes:
        return b"".join([chunk async for chunk in module["speak"](words(), url)])

    with serve() as server:
        audio = asyncio.run(speak(f"ws://127.0.0.1:{server.port}{PATH}"))
    assert len(audio) == 9 * FRAME_BYTES
