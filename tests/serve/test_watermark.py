"""The watermark: whole and streamed, after codecs, and what looks for it."""

import importlib.util
import json
import subprocess

import numpy as np
import pytest
import soxr
import torch
from fastapi.testclient import TestClient

from audio_decoding import RATE_HZ, with_av
from fake_engine import FakeEngine
from forked_python import python
from live_client import live_client
from live_server import LiveServer
from vox_serve import detect, speech, watermark_net
from vox_serve.api import create_app
from vox_serve.audio import pcm16, wav_file
from vox_serve.cli import CommandError
from vox_serve.config import Config
from vox_serve.encoders import open_stream
from vox_serve.formats import Output
from vox_serve.provenance import note_of
from vox_serve.runner import Runner

HAS_PERTH = importlib.util.find_spec("perth") is not None
needs_perth = pytest.mark.skipif(not HAS_PERTH, reason="needs the package resemble-perth")
FRAME_BYTES = 3840


@pytest.fixture(scope="module")
def spoken() -> bytes:
    """16-bit PCM of the built-in voice."""
    voice = speech.load("demo")
    samples = voice.say("Please take the second door on the left.", seed=1)
    return pcm16(samples).tobytes()


@pytest.fixture(scope="module")
def marked(spoken) -> bytes:
    return mark(spoken)


def mark(pcm: bytes, piece_bytes: int = FRAME_BYTES) -> bytes:
    from vox_serve.watermark import Watermark

    stage = Watermark()
    pieces = [stage.feed(pcm[i : i + piece_bytes]) for i in range(0, len(pcm), piece_bytes)]
    return b"".join([*pieces, stage.close()])


def floats(pcm: bytes) -> np.ndarray:
    return np.frombuffer(pcm, "<i2").astype(np.float32) / 32768


def score(samples: np.ndarray) -> float:
    return watermark_net.score(torch.from_numpy(samples.astype(np.float32)))


@needs_perth
class TestMark:
    def test_it_is_found_and_its_absence_too(self, spoken, marked):
        assert score(floats(marked)) > 0.8
        assert score(floats(spoken)) < 0.2

    def test_it_is_quiet_and_only_below_2_khz(self, spoken, marked):
        before, after = floats(spoken), floats(marked)
        assert len(before) == len(after)
        mark = after - before
        assert (mark**2).sum() < 0.05 * (before**2).sum()
        energy = np.abs(np.fft.rfft(mark)) ** 2
        high = np.fft.rfftfreq(len(mark), 1 / RATE_HZ) > 2100
        assert energy[high].sum() < 0.01 * energy.sum()

    @pytest.mark.parametrize("piece_bytes", [2, 1000, FRAME_BYTES, 10**7])
    def test_the_pieces_make_no_difference(self, spoken, marked, piece_bytes):
        short = spoken[: 2 * 5000] if piece_bytes == 2 else spoken
        assert mark(short, piece_bytes) == mark(short)

    @pytest.mark.parametrize("num_samples", [0, 1, 1295, 1296, 1920, 5000])
    def test_the_length_stays(self, spoken, num_samples):
        assert len(mark(spoken[: 2 * num_samples])) == 2 * num_samples

    def test_a_frame_in_gives_a_frame_out_54_ms_late(self, spoken):
        from vox_serve.watermark import DELAY_SAMPLES, Watermark

        stage = Watermark()
        frames = [spoken[i : i + FRAME_BYTES] for i in range(0, 10 * FRAME_BYTES, FRAME_BYTES)]
        sizes = [len(stage.feed(frame)) for frame in frames]
        assert sizes == [FRAME_BYTES - 2 * DELAY_SAMPLES, *[FRAME_BYTES] * 9]
        assert DELAY_SAMPLES == 54 * RATE_HZ // 1000

    def test_silence_stays_silent(self):
        assert mark(bytes(10 * FRAME_BYTES)) == bytes(10 * FRAME_BYTES)

    def test_loud_speech_is_clipped_not_wrapped(self, spoken):
        loud = np.clip(floats(spoken) * 20, -1, 1)
        after = floats(mark(pcm16(loud).tobytes()))
        assert (np.sign(after[np.abs(loud) == 1]) == np.sign(loud[np.abs(loud) == 1])).all()

    @pytest.mark.parametrize("name", ["mp3", "opus", "aac", "flac"])
    def test_it_is_found_after_a_codec(self, spoken, name):
        stage = open_stream(Output.of(name, watermark=True))
        pieces = [spoken[i : i + FRAME_BYTES] for i in range(0, len(spoken), FRAME_BYTES)]
        data = b"".join([*map(stage.feed, pieces), stage.close()])
        samples, rate_hz, _ = with_av(data)
        assert score(soxr.resample(samples, rate_hz, RATE_HZ)) > 0.8

    def test_it_is_found_on_the_telephone(self, marked):
        telephone = soxr.resample(soxr.resample(floats(marked), RATE_HZ, 8000), 8000, RATE_HZ)
        assert score(0.3 * telephone) > 0.8

    def test_the_past_of_each_layer_is_that_of_the_whole_network(self, spoken):
        """The streamed network equals its convolutions on all hops at once, but for the future."""
        from vox_serve.watermark import PAST, _matrix, _Network

        network = _Network()
        hops = watermark_net.levels(watermark_net.spectra(torch.from_numpy(floats(spoken))))
        x = hops[:80, : watermark_net.NUM_BINS]
        caches = list(network.silence)
        found = torch.cat([network.run(x[i : i + 8], caches) for i in range(0, 80, 8)])
        y = torch.cat([torch.zeros(80, x.shape[1]), x]).T[None]
        for i, (weight, bias) in enumerate(watermark_net.load_weights().encoder):
            inner = weight.shape[2] > 1
            taps = weight.shape[2] // 2 + 1
            kernel = _matrix(weight).reshape(taps, *weight.shape[1::-1]).permute(2, 1, 0)
            padded = torch.nn.functional.pad(y, (PAST * inner, 0))
            y = torch.nn.functional.conv1d(padded, kernel, bias)
            if i < 6:
                y = torch.nn.functional.leaky_relu(y, watermark_net.SLOPE)
        assert torch.allclose(found, y[0, :, 80:].T, atol=1e-4)


def serve(**settings) -> TestClient:
    config = Config(**settings)
    runner = Runner.for_config(FakeEngine(num_frames=20), config)
    return TestClient(create_app(runner, config, {}))


@needs_perth
class TestServer:
    @pytest.mark.parametrize("speed", [1.0, 2.0])
    def test_whole_equals_streamed_and_differs_from_unmarked(self, speed):
        wanted = {"text": "hello", "speed": speed, "format": "pcm"}
        with serve(watermark=True) as client, serve() as plain:
            whole = client.post("/generate", json=wanted)
            streamed = client.post("/generate", json={**wanted, "streaming": True})
            unmarked = plain.post("/generate", json=wanted).content
        assert whole.headers["content-length"] == str(len(whole.content))
        assert whole.content == streamed.content
        assert len(whole.content) == len(unmarked)
        assert whole.content != unmarked

    def test_a_conversation_keeps_the_codes_without_the_mark(self):
        def codes(client):
            said = {"text": "hello", "conversation": "a", "streaming": True}
            client.post("/generate", json=said)
            return client.get("/v1/conversations/a?codes=1").json()["turns"][0]["codes"]

        with serve(watermark=True) as client, serve() as plain:
            assert codes(client) == codes(plain)

    def test_the_websocket_and_openais_route_have_it_too(self):
        engine = FakeEngine(num_frames=20)
        with LiveServer(engine, watermark=True) as server, live_client(server.port) as client:
            client.speak(["hello"])
            answer = server.post(text="hello", format="pcm")
            assert client.audio[1] == answer.read()

    def test_the_sample_of_a_voice_has_it(self):
        with serve(watermark=True) as client, serve() as plain:
            path = "/v1/audio/voices/0/sample"
            assert client.get(path).content != plain.get(path).content


def test_a_missing_package_is_one_line_before_the_model_is_loaded(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    watermark_net.load_weights.cache_clear()
    with pytest.raises(CommandError, match="needs the package resemble-perth"):
        watermark_net.check_installed()
    watermark_net.load_weights.cache_clear()


class TestDetect:
    def run(self, capsys, *arguments) -> tuple[int, str, str]:
        code = detect.main([*map(str, arguments)])
        out, err = capsys.readouterr()
        return code, out, err

    def file(self, folder, name: str, pcm: bytes, note: str | None):
        stage = open_stream(Output.of(name), note)
        path = folder / f"speech.{name}"
        path.write_bytes(stage.feed(pcm) + stage.close())
        return path

    @pytest.mark.parametrize("name", ["mp3", "opus", "aac", "flac"])
    def test_metadata_is_found(self, tmp_path, capsys, name):
        path = self.file(tmp_path, name, bytes(20 * FRAME_BYTES), note_of("demo"))
        code, out, _ = self.run(capsys, path)
        assert code == 0
        assert f"{path}: synthetic (metadata)" in out
        assert "trainedAlgorithmicMedia" in out

    def test_a_wav_with_a_chunk_and_without(self, tmp_path, capsys):
        from vox_serve.encoders import open_encoder

        pcm = bytes(20 * FRAME_BYTES)
        encoder = open_encoder(Output.of("wav"), note_of("demo"), len(pcm) // 2)
        (tmp_path / "chunk.wav").write_bytes(encoder.feed(pcm) + encoder.close())
        (tmp_path / "plain.wav").write_bytes(wav_file(pcm, RATE_HZ))
        assert self.run(capsys, tmp_path / "chunk.wav")[0] == 0
        code, out, _ = self.run(capsys, tmp_path / "chunk.wav", tmp_path / "plain.wav")
        assert code == detect.EXIT_UNMARKED
        assert "plain.wav: no mark found" in out

    def test_what_cannot_be_read_is_told_and_the_rest_looked_at(self, tmp_path, capsys):
        (tmp_path / "text.wav").write_text("no audio")
        good = self.file(tmp_path, "mp3", bytes(20 * FRAME_BYTES), note_of("demo"))
        code, out, err = self.run(capsys, tmp_path / "text.wav", tmp_path / "none.wav", good)
        assert code == detect.EXIT_UNREADABLE
        assert len(err.splitlines()) == 2
        assert "synthetic" in out

    @needs_perth
    def test_the_watermark_survives_a_file_without_metadata(self, tmp_path, capsys, spoken, marked):
        for name, pcm, code in (("mp3", marked, 0), ("opus", spoken, detect.EXIT_UNMARKED)):
            path = self.file(tmp_path, name, pcm, None)
            found, out, _ = self.run(capsys, "--json", path)
            assert found == code
            fields = json.loads(out)
            assert fields["watermark"] is fields["synthetic"] is (code == 0)

    @needs_perth
    def test_a_part_of_a_longer_recording_is_enough(self, tmp_path, spoken, marked):
        noise = np.random.default_rng(0).normal(0, 300, 25 * RATE_HZ).astype("<i2").tobytes()
        path = tmp_path / "long.wav"
        path.write_bytes(wav_file(noise + 5 * marked + noise, RATE_HZ))
        assert detect.find_marks(path).has_watermark
        path.write_bytes(wav_file(noise + 5 * spoken + noise, RATE_HZ))
        assert not detect.find_marks(path).has_watermark

    def test_without_the_package_it_says_so(self, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr(detect, "_score", lambda: None)
        path = tmp_path / "plain.wav"
        path.write_bytes(wav_file(bytes(FRAME_BYTES), RATE_HZ))
        code, out, _ = self.run(capsys, path)
        assert code == detect.EXIT_UNMARKED
        assert "resemble-perth is not installed" in out


@needs_perth
def test_say_marks_its_file(tmp_path):
    from vox_serve import say

    path = tmp_path / "a.mp3"
    text = "Please take the second door on the left."
    assert say.main([text, "--seed", "1", "--watermark", "-o", str(path)]) == 0
    marks = detect.find_marks(path)
    assert marks.has_watermark
    assert marks.metadata


def test_a_plain_start_imports_nothing_of_it():
    code = (
        "import sys; from vox_serve import api, detect, launch, say;"
        "print([name for name in sys.modules if 'watermark' in name or name == 'perth'])"
    )
    done = subprocess.run([*python(), "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
