"""The plainest policy: every request gets a frame in every step, prompts in order of arrival."""

from collections.abc import Iterable

from vox_serve.policy import WHOLE_TOKENS, Row, Step
from vox_serve.step_times import StepTimes


def choose_all(rows: Iterable[Row], now_s: float, times: StepTimes, chunk_tokens: int) -> Step:
    """All the work there is. It gives most speech in all, and no listener has a claim.

    Args:
        rows: all live requests, in order of arrival.
        now_s, times: not used; as in `policy.choose_step`.
        chunk_tokens: most prompt tokens of a step with several requests.
    """
    rows = list(rows)
    if len(rows) == 1:
        chunk_tokens = max(chunk_tokens, WHOLE_TOKENS)
    frames, prompts = [], []
    for row in rows:
        if not row.num_missing:
            frames.append(row)
        elif chunk_tokens:
            prompts.append((row, min(row.num_missing, chunk_tokens)))
            chunk_tokens -= prompts[-1][1]
    return Step(frames, prompts)
