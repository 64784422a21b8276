import io
import wave

import numpy as np
import pytest
import soundfile

from vox_serve.audio import pcm16, wav_file, wav_header
from vox_serve.recording import AudioError, read_audio


def test_pcm16_rounds_half_to_even_and_clamps():
    steps = np.array([0.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 32767.4, -32768.0], np.float32)
    assert pcm16(steps / 32768).tolist() == [0, 0, 2, 2, 0, -2, -2, 32767, -32768]
    beyond = np.array([1.0, 1.5, -1.5, 1e30, np.inf, -np.inf, np.nan], np.float32)
    assert pcm16(beyond).tolist() == [32767, 32767, -32768, 32767, 32767, -32768, 0]


def test_pcm16_keeps_shape_and_byte_order():
    assert pcm16(np.zeros((2, 3), np.float32)).shape == (2, 3)
    assert pcm16(np.array([1 / 32768], np.float32)).tobytes() == b"\x01\x00"


def test_pcm16_survives_the_round_trip_within_half_a_step():
    audio = np.random.default_rng(0).uniform(-0.999, 0.999, 5000).astype(np.float32)
    back, rate_hz = soundfile.read(io.BytesIO(wav_file(pcm16(audio).tobytes())), dtype="float32")
    assert rate_hz == 24_000
    assert np.abs(back - audio).max() <= 2**-16


@pytest.fixture(params=[0, 1, 1920, 4321], ids="{} samples".format)
def samples(request) -> np.ndarray:
    return np.random.default_rng(1).integers(-32768, 32768, request.param).astype("<i2")


def test_wav_file_is_what_the_stdlib_writes(samples):
    expected = io.BytesIO()
    with wave.open(expected, "wb") as writer:
        writer.setparams((1, 2, 16_000, 0, "NONE", ""))
        writer.writeframes(samples.tobytes())
    assert wav_file(samples.tobytes(), 16_000) == expected.getvalue()


@pytest.mark.parametrize("as_file", [False, True], ids=["bytes", "file"])
def test_a_stream_of_unknown_length_opens_everywhere(samples, as_file, tmp_path):
    content = wav_header(None) + samples.tobytes()
    path = tmp_path / "stream.wav"
    path.write_bytes(content)

    with wave.open(str(path) if as_file else io.BytesIO(content)) as reader:
        assert reader.getparams()[:3] == (1, 2, 24_000)
        assert reader.readframes(reader.getnframes()) == samples.tobytes()
    read, rate_hz = soundfile.read(path if as_file else io.BytesIO(content), dtype="int16")
    assert rate_hz == 24_000
    assert np.array_equal(read, samples)


def _tone(rate_hz: int) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * 440 * np.arange(rate_hz) / rate_hz)).astype(np.float32)


@pytest.mark.parametrize("rate_hz", [8000, 16_000, 24_000, 44_100, 48_000])
def test_read_audio_resamples(rate_hz, tmp_path):
    path = tmp_path / "tone.wav"
    soundfile.write(path, _tone(rate_hz), rate_hz, subtype="FLOAT")
    audio = read_audio(path)
    assert audio.dtype == np.float32
    assert audio.shape == (24_000,)
    inner = slice(1000, -1000)  # the resampling filter rings at both ends
    np.testing.assert_allclose(audio[inner], _tone(24_000)[inner], atol=2e-3)


def test_read_audio_mixes_channels(tmp_path):
    path = tmp_path / "stereo.flac"
    left, right = _tone(24_000), 0.3 * np.random.default_rng(0).uniform(-1, 1, 24_000)
    soundfile.write(path, np.stack([left, right], 1), 24_000)
    np.testing.assert_allclose(read_audio(path), (left + right) / 2, atol=1e-4)


def test_read_audio_leaves_silent_channels_out(tmp_path):
    path = tmp_path / "left.flac"
    left = _tone(24_000)
    soundfile.write(path, np.stack([left, 1e-4 * left], 1), 24_000)
    np.testing.assert_allclose(read_audio(path), left, atol=1e-4)


@pytest.mark.parametrize(
    ("left", "right", "chosen"), [(1, -1, 0), (1, -1.01, 0), (-0.6, 1, 1), (1, -0.6, 0)]
)
def test_read_audio_takes_the_loudest_of_channels_that_cancel(tmp_path, left, right, chosen):
    path = tmp_path / "phase.wav"
    channels = np.stack([left * _tone(24_000), right * _tone(24_000)], 1)
    soundfile.write(path, channels, 24_000, "FLOAT")
    np.testing.assert_array_equal(read_audio(path), channels[:, chosen].astype(np.float32))


def test_read_audio_says_what_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such audio file: .*missing\.wav"):
        read_audio(tmp_path / "missing.wav")
    (tmp_path / "text.wav").write_text("this is no audio")
    with pytest.raises(AudioError, match=r"cannot read audio from .*text\.wav"):
        read_audio(tmp_path / "text.wav")
    (tmp_path / "empty.wav").write_bytes(wav_file(b""))
    with pytest.raises(AudioError, match=r"empty\.wav holds no samples"):
        read_audio(tmp_path / "empty.wav")
    (tmp_path / "headerless.raw").write_bytes(bytes(100))
    with pytest.raises(AudioError, match=r"cannot read audio from .*headerless\.raw"):
        read_audio(tmp_path / "headerless.raw")
    samples = np.zeros(100, np.float32)
    for value in (np.nan, np.inf):
        samples[50] = value
        soundfile.write(tmp_path / "nan.wav", samples, 24_000, subtype="FLOAT")
        with pytest.raises(AudioError, match=r"nan\.wav holds samples that are not numbers"):
            read_audio(tmp_path / "nan.wav")
