"""Makes a prompt for the codec from a recording as people have it.

Codes depend on the level of the speech and on its place within the codec's frames: with the
built-in voice's codec, 6 dB or 20 ms change half of codebook 0. So a clean recording keeps its
samples and its frames. Whole frames of silence are dropped at both ends, and only a level that is
certainly wrong is corrected.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from vox_serve.recording import AudioError, Recording

SILENT_RMS = 1e-4
"""A recording whose loudest 50 ms are below this (-80 dBFS) is silent; 16-bit dither has 4e-5."""
QUIET_DBFS = -35.0
"""Level of speech below which a recording is raised to `SPEECH_DBFS`."""
SPEECH_DBFS = -24.0
"""Level of speech after matching: between those of the built-in speakers. See
`speech_level_dbfs`."""
MAX_OVERSHOOT = 1.26
"""Peaks up to here (2 dB) are what lossy coding leaves, and are scaled down to 1. Beyond it the
scale of a file means nothing, and its level is matched."""
MAX_OFFSET = 0.05
"""Mean of the samples, relative to their RMS, above which it is an offset and is removed."""
MARGIN_S = 0.1
"""Silence that is kept at either end, and up to one frame more."""
PADDING_S = 0.3
"""Duration of silence at the start that is taken for padding (see `trim`)."""
MIN_END_S = 0.04
"""Silence after speech that reaches the end of a recording. Context that ends abruptly makes CSM
swallow last words."""
_WINDOW_S = 0.01
_LOUD_WINDOWS = 5  # 50 ms
_FADE_S = 0.01
_CUT_SEARCH_S = 2.0


@dataclass(frozen=True)
class PromptOptions:
    """Bounds of a prompt, and the treatment of its level.

    Attributes:
        level: "auto" corrects levels that are certainly wrong: below `QUIET_DBFS`, or peaks above
            `MAX_OVERSHOOT`. "match" sets every recording to `SPEECH_DBFS`. "keep" only scales peaks
            above 1 down.
        min_s: shortest recording.
        max_s: longest prompt.
        too_long: "refuse" a longer one, since its transcript would not fit what is left, or "cut"
            it at the quietest place near `max_s`.
    """

    level: Literal["auto", "match", "keep"] = "auto"
    min_s: float = 0.1
    max_s: float = float("inf")
    too_long: Literal["refuse", "cut"] = "refuse"


def clean_prompt(
    recording: Recording,
    sample_rate_hz: int,
    frame_samples: int,
    options: PromptOptions = PromptOptions(),
) -> np.ndarray:
    """Make a prompt: remove an offset, trim silence, resample, correct the level, end in silence.

    A mono recording at the codec's rate with speech from start to end, at a usual level, keeps
    its samples; zeros may follow.

    Args:
        recording: decoded audio.
        sample_rate_hz: the codec's rate.
        frame_samples: samples of a frame at that rate.
        options: bounds and level.

    Returns:
        `[S]` float32 in -1..1, contiguous.

    Raises:
        AudioError: the recording is silent, too short or too long.
    """
    samples, rate_hz, name = recording.samples, recording.sample_rate_hz, recording.name
    duration_s = len(samples) / rate_hz
    if not len(samples):
        raise AudioError(f"{name} holds no samples")
    if duration_s < options.min_s:
        raise AudioError(
            f"{name} is {duration_s * 1000:.3g} ms long; at least {options.min_s:g} s are needed"
        )
    samples = _without_offset(samples)
    if _loudest(_powers(samples, rate_hz)) < SILENT_RMS**2:
        raise AudioError(f"{name} is silent")
    samples = trim(samples, rate_hz, frame_samples / sample_rate_hz)
    samples = Recording(samples, rate_hz, name).at_rate(sample_rate_hz)
    samples = _levelled(samples, sample_rate_hz, options.level)
    max_samples = int(min(options.max_s, 2**31) * sample_rate_hz)
    if len(samples) > max_samples:
        if options.too_long == "refuse":
            raise AudioError(
                f"{name} is {len(samples) / sample_rate_hz:.6g} s long; at most {options.max_s:g} "
                "s fit"
            )
        samples = cut_at_pause(samples, sample_rate_hz, max_samples)
    samples = _ending_in_silence(samples, sample_rate_hz, frame_samples)
    return np.ascontiguousarray(samples[:max_samples], dtype=np.float32)


def trim(samples: np.ndarray, rate_hz: int, frame_s: float) -> np.ndarray:
    """Drop whole frames of silence at both ends, but for `MARGIN_S`.

    Silence is 50 dB below the loudest 50 ms or, where the recording has noise, up to 6 dB above
    that noise, if that is at least 30 dB below.

    Frames count from the first sample, so that trimming changes no code of what remains. After
    `PADDING_S` of silence they count from its end: padding that somebody added then changes no
    code either, as far as noise leaves its end audible.

    Args:
        samples: `[S]`, not silent.
        rate_hz: their rate.
        frame_s: duration of a frame.

    Returns:
        A view of them.
    """
    first, last = _sound(samples, rate_hz)
    margin, frame = MARGIN_S * rate_hz, frame_s * rate_hz
    origin = _padding(samples, rate_hz)
    start = origin + frame * np.floor((first - margin - origin) / frame)
    start = max(start, origin % frame)
    end = start + frame * np.ceil((last + margin - start) / frame)
    return samples[round(start) : round(end)]


def cut_at_pause(samples: np.ndarray, rate_hz: int, max_samples: int) -> np.ndarray:
    """Cut samples to at most `max_samples`, in the quietest 50 ms of the last 2 s, and fade out.

    The search covers at most the last half of what may stay.

    Args:
        samples: `[S]`.
        rate_hz: their rate.
        max_samples: at least 1.

    Returns:
        New samples, whose last 10 ms fade out.
    """
    kept = samples[:max_samples]
    begin = max(len(kept) // 2, len(kept) - int(_CUT_SEARCH_S * rate_hz))
    powers = _powers(kept[begin:], rate_hz)
    if len(powers) >= _LOUD_WINDOWS:
        loudness = np.convolve(powers, np.ones(_LOUD_WINDOWS), "valid")
        quietest = len(loudness) - 1 - int(loudness[::-1].argmin())  # the last of equals
        middle = (quietest + _LOUD_WINDOWS / 2) * _window(rate_hz)
        kept = kept[: begin + int(middle)]
    kept = kept.copy()
    fade = min(len(kept), int(_FADE_S * rate_hz))
    if fade:
        kept[-fade:] *= np.linspace(1, 0, fade, dtype=np.float32)
    return kept


def speech_level_dbfs(samples: np.ndarray, rate_hz: int) -> float:
    """RMS of the windows of 10 ms that are at most 30 dB below the loudest 50 ms, in dBFS."""
    powers = _powers(samples, rate_hz)
    spoken = powers[powers >= 1e-3 * _loudest(powers)]
    return float(10 * np.log10(max(spoken.mean(), 1e-20)))


def _levelled(samples: np.ndarray, rate_hz: int, level: str) -> np.ndarray:
    peak, gain = float(np.abs(samples).max()), 1.0
    speech_dbfs = speech_level_dbfs(samples, rate_hz)
    is_wrong = speech_dbfs < QUIET_DBFS or peak > MAX_OVERSHOOT
    if level == "match" or (level == "auto" and is_wrong):
        gain = 10 ** ((SPEECH_DBFS - speech_dbfs) / 20)
    if peak * gain > 1:
        gain = 1 / peak
    return samples if gain == 1 else np.clip(samples * np.float32(gain), -1, 1)


def _ending_in_silence(samples: np.ndarray, rate_hz: int, frame_samples: int) -> np.ndarray:
    """Append zeros up to a whole frame, at least `MIN_END_S` if sound reaches the end."""
    zeros = -len(samples) % frame_samples
    _, last = _sound(samples, rate_hz)
    at_end = len(samples) - last < MIN_END_S * rate_hz
    if at_end and zeros < MIN_END_S * rate_hz:
        zeros += frame_samples
    return np.pad(samples, (0, zeros))


def _without_offset(samples: np.ndarray) -> np.ndarray:
    mean = samples.mean(dtype=np.float64)
    rms = np.sqrt(np.einsum("n,n->", samples, samples, dtype=np.float64) / len(samples))
    if abs(mean) <= MAX_OFFSET * rms:
        return samples
    return samples - np.float32(mean)


def _sound(samples: np.ndarray, rate_hz: int) -> tuple[int, int]:
    """First and last sample that is not silence; the last is exclusive."""
    powers = _powers(samples, rate_hz)
    loud = _loudest(powers)
    threshold = np.clip(4 * np.percentile(powers, 5), 1e-5 * loud, 1e-3 * loud)
    heard = np.flatnonzero(powers >= threshold)
    window = _window(rate_hz)
    return int(heard[0]) * window, min(len(samples), (int(heard[-1]) + 1) * window)


def _padding(samples: np.ndarray, rate_hz: int) -> int:
    """Samples before the first that stands out from silence at the start; 0 without silence."""
    lead = samples[: int(PADDING_S * rate_hz)]
    from_mean = np.abs(samples - lead.mean())
    noise, peak = from_mean[: len(lead)].max(), from_mean.max()
    if noise > 0.01 * peak:
        return 0
    return int((from_mean > max(2 * noise, 5e-4 * peak)).argmax())


def _window(rate_hz: int) -> int:
    return max(1, round(_WINDOW_S * rate_hz))


def _powers(samples: np.ndarray, rate_hz: int) -> np.ndarray:
    """Mean power of windows of 10 ms, float64; the last may be shorter, its mean is not."""
    window = _window(rate_hz)
    padded = np.pad(samples, (0, -len(samples) % window)).reshape(-1, window)
    return np.einsum("nw,nw->n", padded, padded, dtype=np.float64) / window


def _loudest(powers: np.ndarray) -> float:
    """Power of the loudest 50 ms."""
    width = min(_LOUD_WINDOWS, len(powers))
    return float(np.convolve(powers, np.full(width, 1 / width), "valid").max())
