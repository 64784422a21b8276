"""The teacher: hibari-tts (Apache-2.0), as two speakers, with exact phone times and pulses.

Both speakers' pulses follow pulse codes (`pulse_codes.py`) made of the network's F0 curve.
Speaker 0 is the bundled voice, synthesised with that pulse train. Speaker 1 is the same voice,
lowered: resampling slows the waveform, which lowers pitch and formants (the network speaks faster
to compensate); then pitch-synchronous overlap-add moves its pulses to those of the codes.
"""

import math
import os
from fractions import Fraction

import hibari
import numpy as np
import onnx
import onnxruntime
from hibari import Hibari, dsp
from scipy.signal import resample_poly

import pulse_codes
from pulse_codes import (
    FRAME_SAMPLES,
    MIN_F0_HZ,
    UNVOICED_PERIOD_S,
    move_pulses,
    pulse_marks,
    pulses,
    raise_questions,
)

SAMPLE_RATE_HZ = dsp.SR
DURATION_SAMPLES = 600  # the network counts phone durations in steps of 25 ms
SLOWDOWN = Fraction(43, 50)  # speaker 1: all frequencies times 0.86
LOW_PITCH = 0.62  # speaker 1: final F0 relative to speaker 0
STRESS = "ˈˌ"
EDGE_SAMPLES = 1440  # silence kept at both ends, on average
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
        """Returns (trimmed and levelled float32 samples [S], [(phone, its end sample)], pulse codes
        [S / 1920]), or None for a text without phones.

        A phone is one character of hibari's alphabet, with any stress mark before it.
        """
        rng = np.random.default_rng(seed)
        slowdown = SLOWDOWN if speaker == 1 else Fraction(1)
        spectra, phones, ends = [], [], [0]
        for phonemes in self.frontend.phonemize(text):
            symbols = [c for c in phonemes if c in self.frontend.vocab]
            if not symbols:
                continue
            feed = {
                "ids": np.asarray([self.frontend.ids(phonemes)], np.int64),
                "speed": np.asarray([speed / float(slowdown)], np.float32),
            }
            *spectrum, durations = self.session.run(None, feed)
            spectra.append([array[0] for array in spectrum])
            scale = DURATION_SAMPLES / float(slowdown)
            phone_ends = ends[-1] + np.cumsum(durations.reshape(-1)) * scale
            phones += join_stress(["", *symbols, ""], phone_ends)
            source_samples = spectra[-1][0].shape[1] * dsp.HOP
            ends.append(ends[-1] + math.ceil(source_samples / slowdown))
        if not spectra:
            return None
        ratio = LOW_PITCH if speaker == 1 else 1.0
        f0_hz, voiced = pitch_curve(spectra, ends, float(slowdown), ratio)
        f0_hz = raise_questions(f0_hz, voiced, phones)
        codes = pulse_codes.encode(f0_hz, voiced)
        phase, f0_hz = pulse_codes.trajectory(codes)
        parts = []
        for index, spectrum in enumerate(spectra):
            span = slice(ends[index], ends[index + 1])
            if speaker == 1:
                source, source_hz, source_voiced = own_pulses(spectrum[5])
                train = pulses(source, source_hz, source_voiced)
                samples = synthesize(spectrum, train, rng)
                samples = resample_poly(samples, slowdown.denominator, slowdown.numerator)
                at = np.arange(len(samples)) * float(slowdown)
                source, source_hz, source_voiced = (
                    np.interp(at, np.arange(len(train)), x)
                    for x in (source, source_hz * float(slowdown), source_voiced)
                )
                marks = pulse_marks(source, source_voiced > 0.5)
                periods = np.where(
                    source_voiced[marks] > 0.5,
                    SAMPLE_RATE_HZ / source_hz[marks],
                    UNVOICED_PERIOD_S * SAMPLE_RATE_HZ,
                )
                targets = pulse_marks(phase[span], voiced[span])
                samples = move_pulses(samples, marks, periods, targets)
            else:
                samples = synthesize(spectrum, pulses(phase[span], f0_hz[span], voiced[span]), rng)
            parts.append(samples)
        return trim_and_level(np.concatenate(parts), phones, codes)


def pitch_curve(spectra, ends, slowdown, ratio):
    """F0 (bridged where unvoiced) and voicing of every output sample, in whole frames."""
    length = -(-ends[-1] // FRAME_SAMPLES) * FRAME_SAMPLES
    time, f0_hz = [], []
    for start, spectrum in zip(ends, spectra, strict=False):
        curve = spectrum[5]
        time.append(start + (np.arange(len(curve)) + 0.5) * dsp.HOP / slowdown)
        f0_hz.append(curve * ratio)
    time, f0_hz = np.concatenate(time), np.concatenate(f0_hz)
    at = np.arange(length)
    heard = f0_hz > MIN_F0_HZ * ratio
    if not heard.any():
        return np.full(length, 100.0), np.zeros(length, bool)
    return np.interp(at, time[heard], f0_hz[heard]), np.interp(at, time, heard) > 0.5


def synthesize(spectrum, train, rng):
    """dsp.synth with another pulse train."""
    harmonic, phase, noise, free, free_phase, _ = spectrum
    shape = (harmonic.shape[0], 2 * harmonic.shape[1])
    voice = dsp.stft(train, harmonic.shape[1]) * np.exp(1j * np.pi * np.tanh(phase))
    spectrum = voice * dsp.ex(harmonic) + np.exp(1j * free_phase) * dsp.ex(free)
    hiss = rng.standard_normal(shape, dtype=np.float32).view(np.complex64)
    return dsp.ola((spectrum + hiss * dsp.ex(noise)).astype(np.complex64))


def own_pulses(f0_hz):
    """The network's F0 per hop -> its pulses' (phase in cycles, F0 in Hz, voicing) per sample."""
    at = (np.arange(len(f0_hz) * dsp.HOP) + 0.5) / dsp.HOP - 0.5
    curve = np.interp(at, np.arange(len(f0_hz)), f0_hz)
    clamped = np.maximum(curve, MIN_F0_HZ)
    return np.cumsum(clamped) / SAMPLE_RATE_HZ, clamped, curve > MIN_F0_HZ


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


def trim_and_level(samples, phones, codes):
    samples = samples / max(0.05, float(np.sqrt((samples**2).mean()))) * TARGET_RMS
    samples = samples * min(1.0, 0.99 / float(np.abs(samples).max()))
    loud = np.nonzero(np.abs(samples) > SILENCE)[0]
    if len(loud) == 0:
        return None
    # Whole frames, or the codes would not fit.
    first = max(0, loud[0] - EDGE_SAMPLES // 2) // FRAME_SAMPLES
    last = min(-(-(loud[-1] + EDGE_SAMPLES // 2) // FRAME_SAMPLES), len(codes))
    start = first * FRAME_SAMPLES
    samples = np.pad(samples, (0, len(codes) * FRAME_SAMPLES - len(samples)))
    samples = samples[start : last * FRAME_SAMPLES].astype(np.float32)
    phones = [(phone, min(max(0, int(end - start)), len(samples))) for phone, end in phones]
    return samples, phones, codes[first:last]
