"""The pulses of the voice: codes, marks, and the channels that carry them."""

import numpy as np
import pytest
import torch
from transformers import MimiModel

import codec
import pulse_codes
import wires
from common import FRAME_SAMPLES


def test_pulse_codes_follow_the_pitch():
    time_s = np.arange(40 * FRAME_SAMPLES) / 24000
    f0_hz = 180 + 40 * np.sin(2 * np.pi * 0.7 * time_s)
    voiced = (time_s < 1.2) | (time_s > 1.6)
    codes = pulse_codes.encode(f0_hz, voiced)
    assert (codes[16:19] == 0).all()
    assert (codes[:15] > 0).all()
    phase, made_hz = pulse_codes.trajectory(codes)
    inside = slice(FRAME_SAMPLES, 14 * FRAME_SAMPLES)
    assert np.abs(made_hz - f0_hz)[inside].mean() < 4
    advance = np.diff(phase[inside]) * 24000  # no jump in phase at any frame's edge
    np.testing.assert_allclose(advance, made_hz[inside][1:], rtol=0.01)
    start, advance = pulse_codes.unpack(codes)
    both = (codes[1:] > 0) & (codes[:-1] > 0)
    assert ((start[:-1] + advance[:-1])[both] % pulse_codes.GRID == start[1:][both]).all()


def test_pitch_rises_at_question_marks_alone():
    rate = pulse_codes.SAMPLE_RATE_HZ
    f0_hz = np.linspace(220, 160, 3 * rate)
    voiced = np.arange(3 * rate) < 2.6 * rate
    phones = [("a", 1.2 * rate), ("?", 1.5 * rate), ("b", 2.7 * rate), (".", 3.0 * rate)]
    raised = pulse_codes.raise_questions(f0_hz, voiced, phones)
    changed = np.nonzero(raised != f0_hz)[0]
    assert changed[0] >= 0.75 * rate - 1
    assert changed[-1] < 1.5 * rate
    assert (np.diff(raised[int(0.8 * rate) : int(1.2 * rate)]) >= 0).all()
    high_hz = raised[int(1.1 * rate)]
    assert high_hz == pytest.approx(min(208 * 2 ** (8 / 12), pulse_codes.TOP_RISE_HZ), rel=0.01)
    silent = pulse_codes.raise_questions(f0_hz, np.zeros_like(voiced), phones)
    assert (silent == f0_hz).all()


def test_pulses_move_to_their_marks():
    time_s = np.arange(24000) / 24000
    source, target_hz, source_hz = 190 * time_s, 130 * time_s, 190.0
    voiced = np.ones(24000, bool)
    train = pulse_codes.pulses(source, np.full(24000, source_hz), voiced)
    marks = pulse_codes.pulse_marks(source, voiced)
    periods = np.full(len(marks), 24000 / source_hz)
    targets = pulse_codes.pulse_marks(target_hz, voiced)
    moved = pulse_codes.move_pulses(train, marks, periods, targets)
    peaks = np.nonzero(moved > 0.7 * moved.max())[0]
    distance = np.abs(peaks[:, None] - targets).min(1)
    assert distance.max() <= 1
    assert len(targets) == 129


def test_wires_carry_the_phase_up_to_24_khz():
    config = codec.make_config(2)
    model = MimiModel(config)
    codec.install_pulses(model)
    frames = 8
    voiced = np.ones(frames * FRAME_SAMPLES, bool)
    codes = pulse_codes.encode(np.full(frames * FRAME_SAMPLES, 203.0), voiced)
    phase, _ = pulse_codes.trajectory(codes)
    steady = np.arange(len(phase)) % FRAME_SAMPLES > pulse_codes.GLIDE_SAMPLES
    steady[: 2 * FRAME_SAMPLES] = False  # F0 glides at first
    with torch.no_grad():
        vectors = codec.pulse_vectors(model, torch.from_numpy(codes)[None])
        hidden = torch.zeros(1, config.hidden_size, frames)
        hidden[:, -pulse_codes.PULSE_DIM :] = vectors[:, codec.CONTENT_DIM :]
        decoder = codec.parts(model)
        hidden = decoder.upsample(hidden)
        wires.carry_pulses(decoder.decoder_seanet)
        # layer -> middle of a step's first point and of its bins in samples, first bin, tolerance
        rates = {6: (5, 10, 4, 0.02), 9: (2, 2, 2, 0.1), 12: (0.5, 0.5, 2, 0.15)}
        for index, layer in enumerate(decoder.decoder_seanet.layers):
            hidden = layer(hidden)
            if index not in rates:
                continue
            wire_at, bin_at, first_bin, tolerance = rates[index]
            at = np.arange(hidden.shape[2]) * (len(phase) // hidden.shape[2])
            kept = steady[at]
            made = hidden[0, :2].T[kept] - wires.WIRE_OFFSET
            # Sample n's phase is taken at n + 0.5.
            wire_phase, bin_phase = (
                np.interp(at + middle - 0.5, np.arange(len(phase)), phase)[kept]
                for middle in (wire_at, bin_at)
            )
            angle = 2 * np.pi * wire_phase
            wanted = np.stack([np.cos(angle), np.sin(angle)], 1)
            np.testing.assert_allclose(made, wanted, atol=tolerance)
            count = wires.BINS[list(rates).index(index)]
            highest = hidden[0, first_bin : first_bin + count].T[kept].argmax(1).numpy()
            assert (highest == np.round(bin_phase * count) % count).mean() > 0.9
