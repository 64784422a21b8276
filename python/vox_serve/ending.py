"""Ends speech that falls silent, and fades what is cut.

CSM sometimes misses its stop frame and goes on with silence or noise. `SilenceGuard` ends silence,
`text_bound.frames_bound` the rest. Neither changes a code before the cut.
"""

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from vox_serve.request import FinishReason, FrameOutput

FRAME_S = 0.08
CUT_REASONS = ("length", "context", "silence")
"""Finish reasons of speech that did not end by itself."""

FADE_SAMPLES = 240
"""10 ms at 24 kHz."""

# Root mean squares of a frame, full scale being 1.
_SILENCE = 10 ** (-60 / 20)
_SILENCE_BELOW_LOUDEST = 10 ** (-40 / 20)
_NOTHING = 10 ** (-80 / 20)


class SilenceGuard:
    """Finds an utterance's silence that is too long.

    A frame is silent below -60 dBFS and 40 dB below the utterance's loudest frame so far, and in
    any case below -80 dBFS, which 16-bit samples hardly tell from zero.

    Args:
        max_silence_s: longest silence; 0 for any.
    """

    def __init__(self, max_silence_s: float) -> None:
        self._max_frames = max_silence_s / FRAME_S
        self._num_silent = 0
        self._loudest = 0.0

    def is_over(self, level: float) -> bool:
        """Count a frame; True if the silence that it ends is too long.

        Args:
            level: root mean square of the frame's samples.
        """
        self._loudest = max(self._loudest, level)
        threshold = max(_NOTHING, min(_SILENCE, self._loudest * _SILENCE_BELOW_LOUDEST))
        self._num_silent = self._num_silent + 1 if level < threshold else 0
        return 0 < self._max_frames <= self._num_silent


def delivered_audio(output: "FrameOutput") -> "np.ndarray | None":
    """A frame's samples as a listener gets them: faded out if the speech is cut after them."""
    if output.audio is None or output.finish_reason not in CUT_REASONS:
        return output.audio
    return fade_out(output.audio)


def fade_out(audio: np.ndarray) -> np.ndarray:
    """A copy of float samples whose last 10 ms fall to zero, as half a cosine."""
    faded = audio.copy()
    if tail := min(len(audio), FADE_SAMPLES):
        faded[-tail:] *= _window(tail)
    return faded


def fade_tail(last_sample: float) -> np.ndarray:
    """10 ms that lead from a sample to zero, for speech that is cut after it was sent.

    Returns:
        `[240]` float32, to be sent after the sample.
    """
    return np.float32(last_sample) * _window(FADE_SAMPLES)


def _window(length: int) -> np.ndarray:
    """Falls from just below 1 to 0."""
    phase = np.arange(1, length + 1) * (np.pi / length)
    return ((1 + np.cos(phase)) / 2).astype(np.float32)


def why_cut(reason: "FinishReason | None", num_frames: int) -> str | None:
    """One line for the user of speech that did not end by itself; None if it did."""
    duration = f"{num_frames * FRAME_S:.1f} s"
    if reason == "length":
        return f"cut at max_frames {num_frames} ({duration}); set more if the text needs more"
    if reason == "context":
        return f"cut at the end of the model's context ({num_frames} frames, {duration})"
    if reason == "silence":
        return f"cut after a long silence at its end ({num_frames} frames, {duration})"
    return None
