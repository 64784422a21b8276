"""Trial steps before the first request, so that it is as fast as later ones.

They load code and memory, and the engine learns how long steps of 1, 2, 4, ... rows and their
prompts take, which the scheduler otherwise guesses. No trace is left but these times: no page is
cached, no counter has changed, and later requests get the codes that they would get anyway.
"""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from vox_serve.fifo import choose_all
from vox_serve.request import Request
from vox_serve.sampling import SamplingParams
from vox_serve.speech_lengths import SpeechLengths

if TYPE_CHECKING:
    from vox_serve.engine import Engine

WARM_UP_S = {"cpu": 0.2, "cuda": 1.0}
"""Seconds of trial steps, by device type. On a CPU they are a twentieth of the start."""

STEPS = 3
"""Steps of each size: their median ignores one that was disturbed."""

MAX_PROMPT_STEPS = 64
"""Steps in which the prompts of one size may be prefilled; more are not waited for."""


def warm_up(
    engine: "Engine", seconds: float | None = None, clock: Callable[[], float] = time.monotonic
) -> list[int]:
    """Make trial steps.

    Args:
        engine: without requests.
        seconds: no larger size is begun whose steps would end later, by their predicted times.
            Steps of one row are made in any case. None for the device's usual time.
        clock: the time in seconds.

    Returns:
        The sizes of the steps, in rows.
    """
    if seconds is None:
        seconds = WARM_UP_S[engine.model.device.type]
    ends_s = clock() + seconds
    choose, lengths = engine.choose, engine.lengths
    counted = engine.num_prompt_positions, engine.num_found_positions
    engine.choose, engine.lengths = choose_all, SpeechLengths()
    ids: list[str] = []
    sizes = []
    has_ended = False  # some request, by itself: its pages are cached

    def step() -> None:
        nonlocal has_ended
        has_ended |= any(output.finish_reason is not None for output in engine.step())

    try:
        for size in _sizes(engine.max_batch_size + engine.num_spare_rows):
            if ids and clock() + (STEPS + 1) * engine.times.seconds(size) > ends_s:
                break
            while len(ids) < size:
                ids.append(_add(engine, len(ids)))
            for _ in range(MAX_PROMPT_STEPS):
                if all(row.num_frames for row in engine.rows):
                    break
                step()
            for _ in range(STEPS):
                step()
            sizes.append(len(engine.rows))
    finally:
        for request_id in ids:
            engine.abort(request_id, keep=False)
        engine.step()  # takes what a GPU has still in flight
        if has_ended:
            engine.reset()
        engine.choose, engine.lengths = choose, lengths
        engine.num_prompt_positions, engine.num_found_positions = counted
    engine.times.forget_recent()
    return sizes


def _sizes(most: int) -> list[int]:
    """1, 2, 4, ... and `most`."""
    return [*(1 << n for n in range((most - 1).bit_length())), most]


def _add(engine: "Engine", number: int) -> str:
    """Add a request; returns its id. Texts begin differently: none finds another's pages."""
    request = Request(
        f"{number}: the quick brown fox.", context=(), sampling=SamplingParams(seed=number)
    )
    engine.add(request)
    return request.id
