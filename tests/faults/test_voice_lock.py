"""A lock on the folder of voices that another process does not give back."""

import base64
import fcntl
import http.client
import json
import threading
from contextlib import contextmanager

import pytest

from fake_engine import TIMEOUT_S, FakeEngine, expected_pcm
from live_server import LiveServer
from recordings import tone
from vox_serve import voice_store
from vox_serve.audio import wav_file
from vox_serve.voice_store import StoreBusyError, UnknownVoiceError, VoiceStore

VOICES = "/v1/audio/voices"


@contextmanager
def locked(folder):
    with open(folder / ".lock", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def ask(server: LiveServer, method: str, path: str, body: object = None):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=TIMEOUT_S)
    connection.request(method, path, None if body is None else json.dumps(body))
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer, content


def test_changes_are_refused_and_all_else_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(voice_store, "LOCK_TIMEOUT_S", 0.3)
    recording = {"audio": base64.b64encode(tone()).decode(), "transcript": "Hello."}
    alice, bob = ({"name": name, "recordings": [recording]} for name in ("alice", "bob"))
    with LiveServer(FakeEngine(), voices=str(tmp_path)) as server:
        assert ask(server, "POST", VOICES, alice)[0].status == 201
        with locked(tmp_path):
            removed = []
            removals = [
                threading.Thread(
                    target=lambda: removed.append(ask(server, "DELETE", f"{VOICES}/alice")[0])
                )
                for _ in range(40)  # more than the threads of the event loop
            ]
            for thread in removals:
                thread.start()
            assert ask(server, "GET", f"{VOICES}/alice")[0].status == 200
            listed = json.loads(ask(server, "GET", VOICES)[1])["data"]
            assert [voice["name"] for voice in listed] == ["0", "1", "alice"]
            spoken = server.post(text="hello", voice="alice")
            assert (spoken.status, spoken.read()) == (200, wav_file(expected_pcm("hello", 3)))
            answer, content = ask(server, "POST", VOICES, bob)
            assert (answer.status, answer.getheader("Retry-After")) == (503, "1")
            assert "locked by another process" in json.loads(content)["detail"]
            for thread in removals:
                thread.join(TIMEOUT_S)
            assert [answer.status for answer in removed] == [503] * 40
        assert ask(server, "POST", VOICES, bob)[0].status == 201
        assert ask(server, "DELETE", f"{VOICES}/alice")[0].status == 200


def test_reading_does_not_wait_for_a_change(tmp_path, monkeypatch):
    """A change that waits for the file's lock holds none that reading needs."""
    store = VoiceStore(tmp_path)
    waits, seen = threading.Event(), threading.Event()

    def wait(_: float) -> None:
        waits.set()
        seen.wait(TIMEOUT_S)

    def remove() -> None:
        with pytest.raises(UnknownVoiceError):
            store.remove("alice")

    monkeypatch.setattr(voice_store.time, "sleep", wait)
    monkeypatch.setattr(voice_store, "LOCK_TIMEOUT_S", 0.0)
    with locked(tmp_path):
        with pytest.raises(StoreBusyError):
            store.remove("alice")
        monkeypatch.setattr(voice_store, "LOCK_TIMEOUT_S", TIMEOUT_S)
        removal = threading.Thread(target=remove)
        removal.start()
        assert waits.wait(TIMEOUT_S)
        assert store.voices() == []
    seen.set()
    removal.join(TIMEOUT_S)
    assert not removal.is_alive()
