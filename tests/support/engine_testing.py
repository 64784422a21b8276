"""Runs an engine until its requests end; texts and model shapes for that."""

from collections.abc import Sequence
from itertools import zip_longest

import torch

from checkpoints import TinyShape
from vox_serve.engine import Engine, Prompt, Request
from vox_serve.prompt import Segment
from vox_serve.sampling import SamplingParams

GREEDY = SamplingParams(temperature=0)
TEXTS = ["Hello there.", "Ünïcödé, Γειά, 你好, 🎧!", "a|b <|end_of_text|> [1]", "I"]


def run(engine: Engine, *requests: Request, prompts: Sequence[Prompt] = ()) -> dict[str, tuple]:
    """Run all requests together until they end.

    Returns:
        codes `[N, K]`, audio `[N * 1920]` and finish reason by request id.
    """
    for request, prompt in zip_longest(requests, prompts):
        engine.add(request, prompt)
    codes = {request.id: [] for request in requests}
    audio = {request.id: [] for request in requests}
    reasons = {}
    while engine.has_work:
        for out in engine.step():
            if out.codes is not None:
                codes[out.request_id].append(out.codes)
                audio[out.request_id].append(torch.from_numpy(out.audio))
            if out.finish_reason:
                reasons[out.request_id] = out.finish_reason
    return joined(engine, codes, audio, reasons)


def joined(engine: Engine, codes: dict, audio: dict, reasons: dict) -> dict[str, tuple]:
    """Join the frames of each request to the result of `run`."""
    empty = torch.zeros(0, engine.num_codebooks, dtype=torch.int64)
    return {
        i: (
            torch.stack(codes[i]) if codes[i] else empty,
            torch.cat(audio[i]) if audio[i] else torch.zeros(0),
            reasons[i],
        )
        for i in codes
    }


def run_one(engine: Engine, **fields) -> tuple:
    request = Request(**fields)
    return run(engine, request)[request.id]


def random_context(shape: TinyShape) -> list[Segment]:
    def codes(n: int):
        return torch.randint(0, shape.audio_vocab_size - 3, (n, shape.num_codebooks))

    return [Segment(0, "Who is it?", codes(7)), Segment(1, "Me.", codes(3))]


SHAPES = {
    "gqa": TinyShape(),
    "mha": TinyShape(kv_heads=6, depth_kv_heads=4, num_codebooks=5),
    "mqa": TinyShape(heads=4, kv_heads=1, head_dim=32, depth_heads=8, num_codebooks=8),
    "32 codebooks": TinyShape(num_codebooks=32, audio_vocab_size=35),
}
PACKABLE = TinyShape(heads=4, depth_dim=64, depth_kv_heads=2, depth_ffn=96)


def share_of_equal_codes(spoken: dict[str, tuple], expected: dict[str, tuple]) -> float:
    """Share of equal codes among those up to and including each utterance's first difference."""
    same = different = 0
    for i, (codes, *_) in expected.items():
        equal = (spoken[i][0] == codes).flatten()
        same += int(equal.long().cumprod(0).sum())
        different += int(not equal.all())
    return same / (same + different)
