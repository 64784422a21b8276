"""The engine's oracle, csm_reference, against transformers' own `generate`."""

import pytest
import torch

from checkpoints import TinyShape, build_tiny
from csm_reference import reference_generate, reference_tokens, reference_trace
from vox_serve.prompt import Segment


def generated(tiny, text: str, frames: int) -> torch.Tensor:
    """Greedy codes `[N, K]` of transformers' `generate`, stop frame included."""
    ids = torch.tensor([reference_tokens(tiny.tokenizer, 0, text)])
    return tiny.model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=frames,
        do_sample=False,
        depth_decoder_do_sample=False,
    )[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rope": "default", "tied": False},
        {"stop_frame": 0},
        {"stop_frame": 1},
        {"stop_frame": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("text", ["hello there", "それでは"])
def test_reference_is_transformers_greedy(options, text):
    tiny = build_tiny(**options)
    stop = options.get("stop_frame")
    theirs = generated(tiny, text, 6)
    ours = reference_trace(tiny, [Segment(0, text)], 6)
    assert ours.stopped == (stop is not None)
    assert len(ours.codes) == (6 if stop is None else stop)
    if stop is not None:
        assert len(theirs) == stop + 1
        assert not theirs[stop].any()
    assert torch.equal(ours.codes, theirs[: len(ours.codes)])
    if stop is None:
        top = ours.logits.topk(2).values
        assert float((top[..., 0] - top[..., 1]).min()) > 1e-3
        assert len(ours.codes.unique()) > 10


@pytest.mark.slow
@pytest.mark.parametrize("num_codebooks", [4, 32])
@pytest.mark.parametrize("stop_frame", [0, 1, 3])
def test_the_stop_frame_does_not_depend_on_the_prompt(num_codebooks, stop_frame):
    tiny = build_tiny(TinyShape(num_codebooks=num_codebooks), stop_frame=stop_frame)
    context = Segment(1, "before", torch.randint(0, 64, (4, num_codebooks)))
    for segments in ([Segment(0, "a")], [Segment(1, "a longer text")], [context, Segment(0, "b")]):
        codes = reference_generate(tiny, segments, stop_frame + 2)
        assert len(codes) == stop_frame
        assert codes.any(dim=1).all()


def test_generation_continues_after_a_near_stop():
    """All codebooks but the last are 0: transformers stops there, Sesame's code does not."""
    tiny = build_tiny(stop_frame=1, near_stop=True)
    ours = reference_trace(tiny, [Segment(0, "hello there")], 4)
    assert not ours.stopped
    assert not ours.codes[1, :-1].any()
    assert ours.codes[1, -1] != 0
    assert len(generated(tiny, "hello there", 4)) == 2
