"""The teacher: hibari-tts (Apache-2.0), as two speakers, with exact phone times.

Speaker 0 is the bundled voice. Speaker 1 is the same voice, lowered: resampling slows the waveform,
which lowers pitch and formants (the network speaks faster to compensate); then pitch-synchronous
overlap-add on the network's own F0 curve lowers the pitch further.
"""

import os
from fractions import Fraction

import hibari
import numpy as np
import onnx
import onnxruntime
from hibari import Hibari, dsp
from scipy.signal import resample_poly

SAMPLE_RATE_HZ = dsp.SR
DURATION_SAMPLES = 600  # the network counts phone durations in steps of 25 ms
SLOWDOWN = Fraction(43, 50)  # speaker 1: all frequencies times 0.86
LOW_PITCH = 0.62  # speaker 1: final F0 relative to speaker 0
STRESS = "ˈˌ"
MIN_F0_HZ = 40.0
UNVOICED_PERIOD_S = 0.005
EDGE_SAMPLES = 1440  # silence kept at both ends
SILENCE = 0.004
TARGET_RMS = 0.09


class Teacher:
    def __init__(self):
        model = onnx.load(os.path.join(os.path.dirname(hibari.__file__), "assets/hibari.onnx"))
        rounded = next(node for node in model.graph.node if node.op_type == "Round").output[0]
        clips = [n for n in model.graph.node if n.op_type == "Clip" and n.input[0] == rounded]
        durations = clips[0].output[0] if clips else rounded
        model.graph.output.append(onnx.helper.make_empty_tensor_value_info(durations))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(model.SerializeToString(), options)
        self.frontend = Hibari()

    def say(self, text: str, speaker: int, speed: float, seed: int):
        """Returns (trimmed and levelled float32 samples [S], [(phone, its end sample)]), or None
        for a text without phones.

        A phone is one character of hibari's alphabet, with any stress mark before it.
        """
        rng = np.random.default_rng(seed)
        slowdown = SLOWDOWN if speaker == 1 else Fraction(1)
        parts, phones, start_sample = [], [], 0
        for phonemes in self.frontend.phonemize(text):
            symbols = [c for c in phonemes if c in self.frontend.vocab]
            if not symbols:
                continue
            feed = {
                "ids": np.asarray([self.frontend.ids(phonemes)], np.int64),
                "speed": np.asarray([speed / float(slowdown)], np.float32),
            }
            *spectrum, durations = self.session.run(None, feed)
            spectrum = [array[0] for array in spectrum]
            samples = dsp.synth(*spectrum, rng)
            if speaker == 1:
                samples = resample_poly(samples, slowdown.denominator, slowdown.numerator)
                hop_samples = dsp.HOP / float(slowdown)
                f0_hz = spectrum[5] * float(slowdown)
                samples = shift_pitch(samples, f0_hz, hop_samples, LOW_PITCH / float(slowdown))
            scale = DURATION_SAMPLES / float(slowdown)
            ends = start_sample + np.cumsum(durations.reshape(-1)) * scale
            phones += join_stress(["", *symbols, ""], ends)
            parts.append(samples)
            start_sample += len(samples)
        if not parts:
            return None
        return trim_and_level(np.concatenate(parts), phones)


def join_stress(symbols, ends):
    """Joins each stress mark to the phone after it."""
    joined, mark = [], ""
    for symbol, end in zip(symbols, ends, strict=True):
        if symbol and symbol in STRESS:
            mark = symbol
            continue
        joined.append((mark + symbol, float(end)))
        mark = ""
    return joined


def trim_and_level(samples, phones):
    samples = samples / max(0.05, float(np.sqrt((samples**2).mean()))) * TARGET_RMS
    samples = samples * min(1.0, 0.99 / float(np.abs(samples).max()))
    loud = np.nonzero(np.abs(samples) > SILENCE)[0]
    if len(loud) == 0:
        return None
    start = max(0, loud[0] - EDGE_SAMPLES)
    samples = samples[start : loud[-1] + EDGE_SAMPLES].astype(np.float32)
    return samples, [(phone, min(max(0, int(end - start)), len(samples))) for phone, end in phones]


def pitch_marks(f0_hz, length, hop_samples):
    """The pulses of an F0 curve: their sample positions, voicing flags and periods."""
    frame_positions = (np.arange(length) + 0.5) / hop_samples - 0.5
    curve = np.interp(frame_positions, np.arange(len(f0_hz)), f0_hz)
    voiced = curve > MIN_F0_HZ
    curve = np.where(voiced, curve, 1 / UNVOICED_PERIOD_S)
    cycles = np.floor(np.cumsum(curve) / SAMPLE_RATE_HZ)
    marks = np.nonzero(np.diff(cycles) > 0)[0] + 1
    return marks, voiced[marks], SAMPLE_RATE_HZ / curve[marks]


def shift_pitch(samples, f0_hz, hop_samples, ratio):
    """TD-PSOLA (Moulines & Charpentier 1990): same length, voiced pitch times `ratio`."""
    length = len(samples)
    marks, voiced, periods = pitch_marks(f0_hz, length, hop_samples)
    if len(marks) < 3:
        return samples
    margin = 1200
    padded = np.pad(samples, (margin, margin))
    out = np.zeros_like(padded)
    position = float(marks[0])
    while position < length:
        nearest = min(int(np.searchsorted(marks, position)), len(marks) - 1)
        if nearest and position - marks[nearest - 1] < marks[nearest] - position:
            nearest -= 1
        reach = min(int(periods[nearest]), margin - 1)
        source, target = marks[nearest] + margin, round(position) + margin
        reach = min(reach, len(padded) - 1 - max(source, target))
        grain = padded[source - reach : source + reach + 1] * np.hanning(2 * reach + 1)
        out[target - reach : target + reach + 1] += grain
        position += periods[nearest] / (ratio if voiced[nearest] else 1.0)
    return out[margin : margin + length].astype(np.float32)
