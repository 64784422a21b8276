"""Step times for bench/simulate.py: measured with the built-in voice, or the limits of a GPU."""

import math
import statistics
import time

from simulated_engine import Machine

from vox_serve.policy import WHOLE_TOKENS

CPU_CHUNK_TOKENS = 64
GPU_CHUNK_TOKENS = 512
MOST_TOKENS = max(WHOLE_TOKENS, GPU_CHUNK_TOKENS)
MOST_ROWS = 4096

H200_BYTES_S = 4.3e12
H200_FLOPS = 500e12
"""Copy bandwidth seen, and what well-made matrix products reach."""
FRAME_BYTES = 9.0e9
KV_BYTES = 16e6
"""CSM-1B in bfloat16: weights of a frame at batch 1; keys and values of 500 positions of a row."""
ROW_FLOPS = 9e9
TOKEN_FLOPS = 2.5e9
BACKBONE_BYTES = 2.5e9
TILE_ROWS = 16


def h200(times_limit: float) -> Machine:
    """CSM-1B on an H200 whose steps take so many times as long as its memory and its units allow.

    No such card has been measured: the figures say what the policy does with a device whose steps
    are stairs, and how many listeners physics allows.
    """

    def rows_s(rows: int) -> float:
        tile = math.ceil(rows / TILE_ROWS) * TILE_ROWS
        memory_s = (FRAME_BYTES + KV_BYTES * rows) / H200_BYTES_S
        return times_limit * max(memory_s, ROW_FLOPS * tile / H200_FLOPS) if rows else 0.0

    def tokens_s(tokens: int) -> float:
        limit_s = max(BACKBONE_BYTES / H200_BYTES_S, TOKEN_FLOPS * tokens / H200_FLOPS)
        return times_limit * limit_s if tokens else 0.0

    return Machine(
        f"H200, {times_limit:g} x limit",
        [rows_s(n) for n in range(MOST_ROWS + 1)],
        [tokens_s(n) for n in range(MOST_TOKENS + 1)],
        GPU_CHUNK_TOKENS,
        jitter=0.03,
        overhead_s=0.004,
    )


def straight(
    step_ms: float,
    row_ms: float,
    prompt_ms: float,
    token_ms: float,
    jitter: float,
    name: str = "two cores, measured",
) -> Machine:
    """A CPU: so much for a step and each row, and for a prompt and each token."""
    return Machine(
        name,
        [(step_ms + row_ms * n) / 1e3 if n else 0.0 for n in range(MOST_ROWS + 1)],
        [(prompt_ms + token_ms * n) / 1e3 if n else 0.0 for n in range(MOST_TOKENS + 1)],
        CPU_CHUNK_TOKENS,
        jitter=jitter,
        overhead_s=0.004,
    )


def two_cores() -> Machine:
    """The built-in voice on two cores, not measured: guessed from two figures that were.

    These are 28 times real time with eight rows, and first audio after 24 ms.
    """
    return straight(9.0, 1.7, 6.0, 0.08, jitter=0.1, name="two cores, guessed")


def measure(rounds: int = 30) -> dict:
    """Time steps of the built-in voice here, and fit straight lines to their medians.

    Returns:
        "steps", rows of [rows, prompt tokens, median ms, least ms, most ms]; and "straight", the
        arguments of the function of this name.
    """
    import numpy as np
    from arrivals import requests

    from vox_serve.loading import load_engine
    from vox_serve.request import Request
    from vox_serve.sampling import SamplingParams

    batches = (1, 2, 4, 8, 12, 16, 24, 32)
    engine = load_engine("demo", max_batch_size=max(batches) + 1)
    texts = requests("steps")
    steps, ratios = [], []
    for rows in batches:
        for tokens in (0, 16, 32, 64):
            times_ms: list[float] = []
            while len(times_ms) < rounds:
                speakers = [next(texts) for _ in range(rows + bool(tokens))]
                ready = [
                    Request(each.text, sampling=SamplingParams(seed=each.seed)) for each in speakers
                ]
                for request in ready[:rows]:
                    engine.add(request)
                made: set[str] = set()
                while len(made) < rows:
                    made |= {output.request_id for output in engine.step()}
                if tokens:
                    letters = (ready[-1].text * tokens)[: tokens - 4]
                    engine.add(Request(letters, sampling=SamplingParams(seed=1)))
                for _ in range(1 if tokens else 8):
                    start_s = time.perf_counter()
                    num_made = sum(output.codes is not None for output in engine.step())
                    if num_made == rows + bool(tokens):
                        times_ms.append((time.perf_counter() - start_s) * 1e3)
                engine.reset()
            middle = statistics.median(times_ms)
            steps.append([rows + bool(tokens), tokens, middle, min(times_ms), max(times_ms)])
            ratios += [each / middle for each in times_ms]
            print(*(f"{cell:.4g}" for cell in steps[-1]), flush=True)
    of_rows = np.array([step for step in steps if not step[1]])
    row_ms, step_ms = np.polyfit(of_rows[:, 0], of_rows[:, 2], 1)
    of_tokens = np.array([step for step in steps if step[1]])
    rest_ms = of_tokens[:, 2] - step_ms - row_ms * of_tokens[:, 0]
    token_ms, prompt_ms = np.polyfit(of_tokens[:, 1], rest_ms, 1)
    straight_ms = {
        "step_ms": step_ms,
        "row_ms": row_ms,
        "prompt_ms": prompt_ms,
        "token_ms": token_ms,
        "jitter": float(np.std(np.log(ratios))),
    }
    return {"steps": steps, "straight": {name: float(v) for name, v in straight_ms.items()}}
