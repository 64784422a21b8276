"""Pulse codes: one codebook that says where the glottal pulses of a frame lie.

A code is the pulse train's phase at the start of a frame (in quarters of a cycle) and its advance
over the frame (in quarters, 3.125 Hz each); code 0 is an unvoiced frame. The teacher speaks with
its F0 moved onto this grid, so the codes determine the phase of every pulse. F0 then glides from
one frame's value to the next over GLIDE_SAMPLES; the grid is taken half a glide earlier to make up
for the delay. A voiced stretch starts at phase 0.

`embeddings` is the codebook: linear in it are cosine and sine of the phase every 0.83 ms.
"""

import itertools

import numpy as np

FRAME_SAMPLES = 1920
SAMPLE_RATE_HZ = 24000
GRID = 4
MIN_ADVANCE = 18  # quarters: 56 Hz
MAX_ADVANCE = 144  # 450 Hz; 1 + 4 * 127 codes fit in 512
GLIDE_SAMPLES = 960
UNVOICED_PERIOD_S = 0.005
TOP_HARMONIC_HZ = 11000.0
MIN_F0_HZ = 40.0
RISE_SEMITONES = 8.0  # of F0 at a question mark, from its median
RISE_S = (0.45, 0.2)  # begin and end of the rise, before the end of the voice, which fades
TOP_RISE_HZ = 300.0
POINTS = 8  # phases per 40 ms state
DENSE_STEP = 20  # samples
FINE_STEP = 10
HALF_DIM = 32
PULSE_DIM = 96
F0_HATS = 14
COMMON_CODES = np.arange(1, 1 + GRID * (100 - MIN_ADVANCE))  # F0 of 56 to 312 Hz


def raise_questions(f0_hz, voiced, phones):
    """F0 per sample, which rises before each question mark.

    Args:
        f0_hz, voiced: per sample; the teacher lets F0 fall there, as in a statement.
        phones: [(phone, its end sample)]; marks of punctuation are phones too.
    """
    raised = f0_hz.copy()
    begin = 0
    for phone, end in phones:
        heard = np.nonzero(voiced[: int(begin)])[0]
        if phone == "?" and len(heard):
            top = heard[-1] + 1
            start, middle = (max(0, top - int(s * SAMPLE_RATE_HZ)) for s in RISE_S)
            usual_hz = np.median(f0_hz[heard])
            high_hz = min(usual_hz * 2 ** (RISE_SEMITONES / 12), TOP_RISE_HZ)
            raised[start:middle] = np.geomspace(usual_hz, high_hz, middle - start)
            raised[middle : int(end)] = high_hz
        begin = end
    return raised


def pack(start, advance):
    """Quarters -> code."""
    return 1 + GRID * (np.clip(advance, MIN_ADVANCE, MAX_ADVANCE) - MIN_ADVANCE) + start % GRID


def unpack(codes):
    """Codes -> (start, advance) in quarters; a phase of 0 and no advance where unvoiced."""
    codes = np.asarray(codes)
    start = np.where(codes > 0, (codes - 1) % GRID, 0)
    return start, np.where(codes > 0, (codes - 1) // GRID + MIN_ADVANCE, 0)


def encode(f0_hz, voiced):
    """F0 and voicing per sample, whole frames of both -> a code per frame."""
    frames = len(f0_hz) // FRAME_SAMPLES
    early = np.pad(f0_hz[GLIDE_SAMPLES // 2 :], (0, GLIDE_SAMPLES // 2), mode="edge")
    cycles = early.reshape(frames, FRAME_SAMPLES).sum(1) / SAMPLE_RATE_HZ * GRID
    speaks = voiced.reshape(frames, FRAME_SAMPLES).any(1)
    codes = np.zeros(frames, np.int64)
    phase, exact = 0, 0.0
    for frame in range(frames):
        if not speaks[frame]:
            phase, exact = 0, 0.0
            continue
        exact += cycles[frame]
        advance = int(np.clip(round(exact - phase), MIN_ADVANCE, MAX_ADVANCE))
        codes[frame] = pack(phase, advance)
        phase += advance
    return codes


def trajectory(codes):
    """Codes -> (phase in cycles, F0 in Hz) of every sample; F0 is 0 where unvoiced."""
    start, advance = (x / GRID for x in unpack(codes))
    before = np.roll(advance, 1)
    before[:1] = 0
    before = np.where(before > 0, before, advance)
    time = np.arange(FRAME_SAMPLES) + 0.5
    ramp = np.minimum(time / GLIDE_SAMPLES, 1.0)
    rate = before[:, None] + (advance - before)[:, None] * ramp
    glide = GLIDE_SAMPLES / FRAME_SAMPLES
    swept = np.where(
        time < GLIDE_SAMPLES,
        time**2 / (2 * GLIDE_SAMPLES),
        time - GLIDE_SAMPLES / 2,
    )
    phase = start - before * glide / 2
    phase = phase[:, None] + before[:, None] * time / FRAME_SAMPLES
    phase = phase + (advance - before)[:, None] * swept / FRAME_SAMPLES
    gaps = phase[1:, 0] - phase[:-1, -1] - rate[1:, 0] / FRAME_SAMPLES
    phase[1:] -= np.cumsum(np.round(gaps))[:, None]  # continuous, so that it can be interpolated
    return phase.reshape(-1), rate.reshape(-1) / FRAME_SAMPLES * SAMPLE_RATE_HZ


def dense_phases(codes, step=DENSE_STEP):
    """Voiced codes [N] -> cosine and sine of the phase, [N, 2 halves, 2 * 960 / step]."""
    start, advance = (x[:, None] / GRID for x in unpack(codes))
    time = (np.arange(FRAME_SAMPLES // step) + 0.5) * step - GLIDE_SAMPLES / 2
    angle = 2 * np.pi * (start + advance * time / FRAME_SAMPLES)
    return np.stack([np.cos(angle), np.sin(angle)], -1).reshape(len(codes), 2, -1)


def dense_basis():
    """[2 * 48, HALF_DIM]: times the channels of a half, the phases of `dense_phases`.

    An F0 of 56 to 312 Hz has few degrees of freedom in 40 ms. Channels lie within -1 to 1.
    """
    phases = dense_phases(COMMON_CODES).reshape(-1, 2 * FRAME_SAMPLES // (2 * DENSE_STEP))
    basis = np.linalg.svd(phases, full_matrices=False)[2][:HALF_DIM].T
    return (basis * np.abs(phases @ basis).max(0)).astype(np.float32)


def channels_of(phases, basis):
    """`dense_phases` -> the channels of each half."""
    return phases @ (basis / (basis**2).sum(0))


def fine_basis():
    """[HALF_DIM, 2 * 96]: the channels of a half times this are its phases every FINE_STEP."""
    basis = dense_basis().astype(np.float64)
    channels = channels_of(dense_phases(COMMON_CODES), basis).reshape(-1, HALF_DIM)
    phases = dense_phases(COMMON_CODES, FINE_STEP).reshape(len(channels), -1)
    return np.linalg.lstsq(channels, phases, rcond=None)[0].astype(np.float32)


def embeddings():
    """The codebook [512, PULSE_DIM] and the upsampling's kernel per channel [PULSE_DIM, 4].

    Channels: the first half's phases, then the second half's, each on `dense_basis`; the next
    frame's first half as this code foretells it, POINTS phases; F0 as triangular hats; voiced;
    always one.
    """
    codes = np.arange(512)
    start, advance = unpack(codes)
    voiced = (advance > 0)[:, None]
    basis = dense_basis().astype(np.float64)
    halves = np.clip(channels_of(dense_phases(codes), basis), -1.2, 1.2)  # rare, high F0
    step = FRAME_SAMPLES // (2 * POINTS)
    time = FRAME_SAMPLES + (np.arange(POINTS) + 0.5) * step - GLIDE_SAMPLES / 2
    later = 2 * np.pi / GRID * (start[:, None] + advance[:, None] * time / FRAME_SAMPLES)
    hats = np.linspace(np.log(MIN_ADVANCE), np.log(100), F0_HATS)
    level = np.log(np.maximum(advance, 1))[:, None]
    parts = [
        voiced * halves.reshape(512, -1),
        voiced * np.cos(later),
        voiced * np.sin(later),
        voiced * np.maximum(0, 1 - np.abs(level - hats) / (hats[1] - hats[0])),
        voiced,
        np.ones((512, 1)),
    ]
    kernel = np.repeat(
        [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [1, 1, 0, 0], [1, -1, 0, 0]],
        [HALF_DIM, HALF_DIM, 2 * POINTS, F0_HATS + 1, 1],
        axis=0,
    )
    return np.concatenate(parts, 1).astype(np.float32), kernel.astype(np.float32)


def pulses(phase, f0_hz, voiced):
    """Band-limited pulse train of a phase curve in cycles: every harmonic has amplitude 1."""
    angle = 2 * np.pi * (phase % 1.0)
    count = np.floor(TOP_HARMONIC_HZ / np.maximum(f0_hz, MIN_F0_HZ)) + 0.5
    below = 2 * np.sin(angle / 2)
    peak = np.abs(below) < 2e-3
    train = np.where(peak, count, np.sin(count * angle) / np.where(peak, 1, below)) - 0.5
    return np.where(voiced, train, 0).astype(np.float32)


def pulse_marks(phase, voiced):
    """Sample positions of a phase curve's pulses, and of grains where it is unvoiced."""
    cycles = np.floor(phase)
    marks = np.nonzero(np.diff(cycles) > 0)[0] + 1
    marks = marks[voiced[marks]]
    step = int(UNVOICED_PERIOD_S * SAMPLE_RATE_HZ)
    stops = np.concatenate([[0], marks, [len(phase)]])
    between = [np.arange(a + step, b - step // 2, step) for a, b in itertools.pairwise(stops)]
    fill = np.concatenate(between)
    return np.sort(np.concatenate([marks, fill[~voiced[fill]]]))


def move_pulses(samples, marks, periods, targets):
    """TD-PSOLA (Moulines & Charpentier 1990): same length, with the pulses at `marks`, of the given
    periods, moved to `targets`."""
    length = len(samples)
    if len(marks) < 3:
        return samples
    margin = 1200
    padded = np.pad(samples, (margin, margin))
    out = np.zeros_like(padded)
    for position in targets:
        nearest = min(int(np.searchsorted(marks, position)), len(marks) - 1)
        if nearest and position - marks[nearest - 1] < marks[nearest] - position:
            nearest -= 1
        reach = min(int(periods[nearest]), margin - 1)
        start, target = marks[nearest] + margin, position + margin
        reach = min(reach, len(padded) - 1 - max(start, target))
        grain = padded[start - reach : start + reach + 1] * np.hanning(2 * reach + 1)
        out[target - reach : target + reach + 1] += grain
    return out[margin : margin + length].astype(np.float32)
