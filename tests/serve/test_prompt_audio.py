"""Prompts from recordings as people have them: samples on a synthetic sound, and the codes of the
built-in voice's speech."""

import io
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import soundfile
import soxr
import torch

from limits import refusal
from vox_serve import say
from vox_serve.engine import Request
from vox_serve.loading import load_engine
from vox_serve.prompt_audio import (
    PromptOptions,
    clean_prompt,
    cut_at_pause,
    speech_level_dbfs,
)
from vox_serve.recording import AudioError, AudioTooLargeError, Limits, Recording, decode
from vox_serve.sampling import SamplingParams

RATE_HZ, FRAME = 24_000, 1920


def clean(samples: np.ndarray, rate_hz: int = RATE_HZ, **options) -> np.ndarray:
    recording = Recording(samples.astype(np.float32), rate_hz)
    return clean_prompt(recording, RATE_HZ, FRAME, PromptOptions(**options))


def encoded(samples, rate_hz=RATE_HZ, form="WAV", subtype="PCM_16") -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate_hz, subtype, format=form)
    return file.getvalue()


def bursts(*durations_s: float, gap_s: float = 0.3, level: float = 0.1) -> np.ndarray:
    """Noise, with digital silence between its bursts."""
    rng = np.random.default_rng(0)
    gap = np.zeros(int(gap_s * RATE_HZ))
    parts = [part for s in durations_s for part in (gap, rng.normal(0, level, int(s * RATE_HZ)))]
    return np.clip(np.concatenate(parts[1:]), -0.99, 0.99).astype(np.float32)


@pytest.mark.parametrize("num_samples", [2400, 1920 * 10 - 1500, 24_000, 100_001])
def test_sound_from_start_to_end_keeps_its_samples(num_samples):
    sound = bursts(num_samples / RATE_HZ)
    prompt = clean(sound)
    np.testing.assert_array_equal(prompt[: len(sound)], sound)
    assert not prompt[len(sound) :].any()
    assert len(prompt) == -(-len(sound) // FRAME) * FRAME


@pytest.mark.parametrize(("over", "frames"), [(0, 11), (1, 11), (FRAME - 959, 12), (960, 11)])
def test_sound_at_the_end_is_followed_by_40_ms_of_silence(over, frames):
    sound = bursts((FRAME * 10 + over) / RATE_HZ)
    assert len(clean(sound)) == frames * FRAME


@pytest.mark.parametrize("silence", [0, 1000, 7200, 31_234, 200_000])
def test_digital_silence_before_a_sound_moves_it_by_whole_frames(silence):
    sound = bursts(0.5, 0.8)
    prompt = clean(np.pad(sound, (silence, 0)))
    start = int(np.flatnonzero(prompt)[0])
    np.testing.assert_array_equal(prompt[start : start + len(sound)], sound)
    if silence >= 7200:
        assert start % FRAME == 0
        assert 2400 <= start < 2400 + FRAME
    else:
        assert start == silence


@pytest.mark.parametrize("noise_db", [-100, -80, -60, -57])
def test_silence_with_noise_is_trimmed_to_its_margins(noise_db):
    sound = bursts(0.5, 0.8)
    noise = np.random.default_rng(1).normal(0, 10 ** (noise_db / 20), len(sound) + 96_000)
    prompt = clean(np.pad(sound, (48_000, 48_000)) + noise)
    assert len(sound) + 4800 <= len(prompt) <= len(sound) + 4800 + 3 * FRAME


def test_pauses_inside_stay():
    sound = bursts(0.3, 0.3, 0.3, gap_s=3)
    np.testing.assert_array_equal(clean(sound)[: len(sound)], sound)


@pytest.mark.parametrize("db", [-30, -40, -45])
def test_soft_ends_stay(db):
    """A breath or a fricative, far below the vowels."""
    sound = bursts(1.0)
    soft = bursts(0.4, level=0.1 * 10 ** (db / 20))
    whole = np.concatenate([soft, sound, soft])
    prompt = clean(np.pad(whole, 24_000))
    start = int(np.flatnonzero(prompt)[0])
    np.testing.assert_array_equal(prompt[start : start + len(whole)], whole)


def test_an_offset_goes():
    sound = bursts(1.0)
    prompt = clean(sound + 0.2)
    np.testing.assert_allclose(prompt[: len(sound)], sound - sound.mean(), atol=1e-6)


@pytest.mark.parametrize(
    ("gain", "level", "expected"),
    [
        (1.0, "auto", 1.0),
        (0.2, "auto", 0.2),  # -34 dBFS
        (0.01, "auto", "matched"),
        (1e-3, "auto", "matched"),
        (4.0, "auto", "matched"),
        (32_768.0, "auto", "matched"),
        (0.2, "match", "matched"),
        (0.01, "keep", 0.01),
        (4.0, "keep", "full scale"),
    ],
)
def test_levels(gain, level, expected):
    sound = bursts(1.0)
    prompt = clean(sound * np.float32(gain), level=level)[: len(sound)]
    share = {
        "matched": 10 ** ((-24 - speech_level_dbfs(sound, RATE_HZ)) / 20),
        "full scale": 1 / np.abs(sound).max(),
    }.get(expected, expected)
    np.testing.assert_allclose(prompt, sound * np.float32(share), rtol=2e-3, atol=1e-6)


def test_peaks_slightly_above_full_scale_are_scaled_down():
    sound = bursts(1.0)
    sound *= 1.1 / np.abs(sound).max()
    np.testing.assert_allclose(clean(sound)[: len(sound)], sound / 1.1, rtol=1e-5)


@pytest.mark.parametrize("max_s", [1.0, 1.5, 2.05, 2.3])
def test_a_cut_falls_into_the_pause_before_the_limit(max_s):
    sound = bursts(0.8, 0.8, 0.8, gap_s=0.2)  # pauses from 0.8 to 1.0 s and from 1.8 to 2.0 s
    kept = cut_at_pause(sound, RATE_HZ, int(max_s * RATE_HZ))
    ends_s = len(kept) / RATE_HZ
    assert 0.8 <= ends_s <= 1.0 or 1.8 <= ends_s <= 2.0
    np.testing.assert_array_equal(kept[:-240], sound[: len(kept) - 240])
    assert kept[-1] == 0


def test_a_cut_without_a_pause_fades_out():
    sound = bursts(3.0)
    kept = cut_at_pause(sound, RATE_HZ, RATE_HZ)
    assert RATE_HZ // 2 <= len(kept) <= RATE_HZ
    assert np.abs(kept[-24:]).max() < 0.1 * np.abs(sound).max()


def test_too_long_is_refused_or_cut():
    sound = bursts(0.8, 0.8)
    assert refusal(clean, sound, max_s=1.5) == ("the recording is 1.9 s long; at most 1.5 s fit")
    assert len(clean(sound, max_s=1.5, too_long="cut")) <= 1.5 * RATE_HZ


@pytest.mark.parametrize(
    ("data", "limits", "said"),
    [
        (encoded(np.zeros(24_000)), {}, "the recording is silent"),
        (encoded(np.full(24_000, 0.5)), {}, "the recording is silent"),
        (encoded(bursts(0.01)), {}, "the recording is 10 ms long; at least 0.1 s are needed"),
        (encoded(bursts(14.6)), {"max_s": 9}, "the recording is 14.6 s long; at most 9 s fit"),
        (encoded(bursts(1)), {"max_bytes": 48_000}, "the recording has 48044 bytes"),
        (encoded(bursts(1)), {"rates_hz": (8000, 16_000)}, "24000 samples per second"),
        (encoded(np.ones((99, 9))), {"max_channels": 8}, "9 channels, accepted are 1 to 8"),
        (encoded(bursts(1), form="AU"), {}, "neither WAV, AIFF, FLAC, OGG nor MP3"),
        (b"", {}, "neither WAV"),
        (b"RIFF", {}, "cannot read audio from the recording"),
    ],
)
def test_refused_recordings(data, limits, said):
    def prompt():
        clean_prompt(decode(data, Limits(common_only=True, **limits)), RATE_HZ, FRAME)

    assert said in refusal(prompt)


def test_the_error_of_too_many_bytes_has_its_own_type():
    with pytest.raises(AudioTooLargeError):
        decode(bytes(11), Limits(max_bytes=10))
    assert issubclass(AudioTooLargeError, AudioError)


class Variant(NamedTuple):
    agree: float  # least share of equal codes of codebook 0
    write: Callable[[np.ndarray], bytes]


def at(rate_hz: int, audio: np.ndarray) -> np.ndarray:
    return soxr.resample(audio, RATE_HZ, rate_hz)


def both(audio: np.ndarray) -> np.ndarray:
    return np.stack([audio, audio], 1)


def padded(audio: np.ndarray) -> np.ndarray:
    return np.pad(audio, (31_234, 50_000))


VARIANTS = {
    "24-bit FLAC": Variant(1, lambda a: encoded(a, form="FLAC", subtype="PCM_24")),
    "stereo MP3 at 48 kHz": Variant(
        0.8, lambda a: encoded(both(at(48_000, a)), 48_000, "MP3", "MPEG_LAYER_III")
    ),
    "OGG at 48 kHz": Variant(0.8, lambda a: encoded(at(48_000, a), 48_000, "OGG", "VORBIS")),
    "44.1 kHz": Variant(0.9, lambda a: encoded(at(44_100, a), 44_100)),
    "96 kHz": Variant(0.9, lambda a: encoded(at(96_000, a), 96_000, subtype="PCM_24")),
    "16 kHz": Variant(0.8, lambda a: encoded(at(16_000, a), 16_000)),
    # Nothing above 4 kHz is left, which fricatives need.
    "8 kHz": Variant(0.6, lambda a: encoded(at(8000, a), 8000)),
    "peaks above 1": Variant(0.8, lambda a: encoded(a * (2 / abs(a).max()), subtype="FLOAT")),
    "-40 dB, 24-bit": Variant(0.8, lambda a: encoded(0.01 * a, subtype="PCM_24")),
    # 16 bits less 40 dB leave 9, and their noise is heard in the pauses.
    "-40 dB, 16-bit": Variant(0.6, lambda a: encoded(0.01 * a)),
    "silence at both ends": Variant(0.9, lambda a: encoded(padded(a))),
    "noise at both ends": Variant(
        0.8,
        lambda a: encoded(padded(a) + np.random.default_rng(0).normal(0, 1e-4, len(padded(a)))),
    ),
    "anti-phase": Variant(1, lambda a: encoded(np.stack([a, -a], 1))),
    "left channel only": Variant(1, lambda a: encoded(np.stack([a, 0 * a], 1))),
    "offset": Variant(0.9, lambda a: encoded(a + 0.1)),
    "146 s": Variant(0.95, lambda a: encoded(np.tile(a, -(-146 * RATE_HZ // len(a))))),
}
"""Recordings of one utterance. Where 80 % cannot be reached, the reason is given."""


@pytest.fixture(scope="module")
def engine():
    return load_engine("demo")


@pytest.fixture(scope="module")
def speech(engine) -> np.ndarray:
    """16-bit speech of the built-in voice."""
    text = (
        "We should get together next Tuesday and talk about the plan. "
        "The museum is free for students and children under twelve."
    )
    request = Request(text=text, speaker=1, sampling=SamplingParams(seed=7), max_frames=125)
    audio = np.asarray(say.speak(engine, request)[0])
    return np.rint(audio * 32_768).astype(np.float32) / 32_768


def codebook_0(engine, prompt: np.ndarray) -> np.ndarray:
    return engine.mimi.encode(torch.from_numpy(prompt)[None], 1)[0, :, 0].numpy()


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_codes_of_a_variant_agree_with_those_of_the_clean_recording(engine, speech, name):
    expected = codebook_0(engine, speech[: len(speech) // FRAME * FRAME])
    recording = decode(VARIANTS[name].write(speech), Limits(common_only=True))
    prompt = clean_prompt(recording, RATE_HZ, FRAME)
    codes = codebook_0(engine, prompt[: len(speech) + 4 * FRAME])
    # Up to two frames of the silence stay.
    shares = [
        np.mean(codes[shift:][: len(expected)] == expected)
        for shift in range(3)
        if len(codes) >= shift + len(expected)
    ]
    print(f"{name}: {max(shares):.2f}")
    assert max(shares) >= VARIANTS[name].agree
    if name == "146 s":
        assert len(prompt) >= 146 * RATE_HZ
