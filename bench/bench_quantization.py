"""Effect of packed weights on the logits, for codebook 0 and for all other codebooks.

Teacher-forced: every packing gets the same text and codes, so its logits are compared with those of
plain float32 weights position by position, and an error early in an utterance is not counted again
at every later position. The codebooks after the first see hidden states of the same packing's
backbone, as in normal use.

- "random": CSM-1B's sizes with random weights, text and codes. The logits are nearly flat, so a
  small error can change the argmax: top-1 agreement here is a bound, not what speech shows.
- "demo": the built-in voice, on codes that it sampled itself in float32 with default settings.

`KL`: divergence of the packed model's distribution from that of plain float32 weights, in nats,
mean over positions. `top-1 %`: share of positions with the same argmax. `MB read`: weights read for
one frame. To check whether speech suffers, run a recogniser:
`tools/train_voice/evaluate.py --quantize`.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import torch
from csm_1b_shapes import CSM_1B, TEXT_ROWS
from report import Report
from torch import Tensor

from vox_serve.csm_weights import MATRICES, PACKINGS, CsmWeights, TransformerWeights
from vox_serve.engine import Prompt, Request
from vox_serve.frame_bytes import frame_bytes
from vox_serve.kv_cache import CacheBatch, CacheSequence, KvCache
from vox_serve.loading import load_engine
from vox_serve.model import CsmModel
from vox_serve.model_config import CsmConfig
from vox_serve.sampling import SamplingParams
from vox_serve.say import speak
from voxkern import ops
from voxkern.quantize import pack

UTTERANCES, TEXT_TOKENS, FRAMES = 8, 16, 16
"""Random utterances: their number, and the size of each."""

SENTENCES = (
    "The train to the coast leaves at a quarter past nine.",
    "She put the letters in a box under the bed.",
    "Could you turn the music down a little, please?",
    "It has been raining since early this morning.",
    "My brother plays the piano better than I do.",
    "We took the long way home because the bridge was closed.",
    "Nobody knew where the old map had come from.",
    "There is fresh bread on the kitchen table.",
)

INT4 = PACKINGS["int4"]
VARIANTS = {
    **PACKINGS,
    "int4, backbone int8": {**INT4, "backbone": "int8"},
    "int4, depth int8": {**INT4, "depth": "int8"},
    "int4, heads int4": {**INT4, "code_heads": "int4"},
    "int8, heads int4": {**PACKINGS["int8"], "code_heads": "int4"},
}
"""The packings that `--quantize` offers, and neighbours of them, in the form of `PACKINGS`."""


class Speech(NamedTuple):
    """The utterances that every packing is evaluated on.

    Attributes:
        prompts: one text prompt per utterance.
        codes: `[N, K]` int64 each, the frames after the prompt.
    """

    prompts: list[Prompt]
    codes: list[Tensor]


class Logits(NamedTuple):
    """float32 logits at every position.

    Attributes:
        code0: `[P, V]`, for each utterance's frames and for the one after its last.
        depth: `[Q, V]`, for each frame's codebooks 1 to K - 1.
    """

    code0: Tensor
    depth: Tensor


def run(report: Report) -> None:
    table = report.table(
        "quantization",
        [
            *("weights", "packing", "activations", "MB read"),
            *("code 0 KL", "code 0 top-1 %", "depth KL", "depth top-1 %"),
        ],
    )
    config = CsmConfig.from_json({**CSM_1B, "text_vocab_size": TEXT_ROWS})
    model = CsmModel(config, random_weights(config))
    _compare(table.add, "random", model, random_speech(config), torch.bfloat16)
    del model
    demo, speech = demo_speech()
    # `--dtype auto` chooses float32 for a model of this size.
    _compare(table.add, "demo", demo, speech, torch.float32)


def _compare(add: Callable, name: str, exact: CsmModel, speech: Speech, dtype: torch.dtype) -> None:
    """Adds a row for each packing with activations of `dtype`, and one for plain bfloat16."""
    expected = teacher_forced(exact, speech)
    pack_once, cast_once = cache(pack), cache(Tensor.to)
    runs = [("none", torch.bfloat16)]
    runs += [(variant, dtype) for variant in VARIANTS if variant != "none"]
    for variant, activations in runs:
        weights = packed(exact.weights, VARIANTS[variant], activations, pack_once, cast_once)
        logits = teacher_forced(CsmModel(exact.config, weights), speech)
        read = frame_bytes(weights).total / 1e6
        errors = [x for pair in zip(expected, logits, strict=True) for x in divergence(*pair)]
        add(name, variant, str(activations).removeprefix("torch."), read, *errors)


def divergence(expected: Tensor, logits: Tensor) -> tuple[float, float]:
    """Mean KL divergence in nats, and the percentage of rows with the same largest logit.

    Args:
        expected, logits: `[P, V]`.
    """
    p, q = expected.double().log_softmax(-1), logits.double().log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1).mean()
    same = (expected.argmax(-1) == logits.argmax(-1)).double().mean()
    return float(kl), 100 * float(same)


def packed(
    weights: CsmWeights,
    packing: dict[str, str],
    dtype: torch.dtype,
    pack: Callable[[Tensor, str], Tensor] = pack,
    cast: Callable[[Tensor, torch.dtype], Tensor] = Tensor.to,
) -> CsmWeights:
    """`weights` with matrices packed as `packing` says and all other tensors cast to `dtype`."""

    def part(name: str) -> TransformerWeights:
        tensors = vars(getattr(weights, name))
        return TransformerWeights(
            **{key: tensor(name, key in MATRICES, x) for key, x in tensors.items()}
        )

    def tensor(name: str, is_matrix: bool, x: Tensor) -> Tensor:
        return pack(x, packing[name]) if is_matrix and name in packing else cast(x, dtype)

    others = {name: x for name, x in vars(weights).items() if isinstance(x, Tensor)}
    return CsmWeights(
        part("backbone"),
        part("depth"),
        **{name: tensor(name, True, x) for name, x in others.items()},
    )


def random_weights(config: CsmConfig) -> CsmWeights:
    """Random float32 weights with independent noise in every matrix.

    The matrices of `CsmWeights.random` share their noise, so its heads correlate with the
    embeddings.
    """
    generator = torch.Generator().manual_seed(0)
    weights = CsmWeights.random(config, torch.float32)
    parts = (weights.backbone, weights.depth)
    matrices = [getattr(part, name) for part in parts for name in MATRICES]
    for matrix in (*matrices, weights.code0_head, weights.projection, weights.code_heads):
        matrix.normal_(0, matrix.shape[-1] ** -0.5, generator=generator)
    return weights


def random_speech(config: CsmConfig) -> Speech:
    generator = torch.Generator().manual_seed(0)
    k = config.num_codebooks
    mask = torch.zeros(TEXT_TOKENS, k + 1, dtype=torch.bool)
    mask[:, k] = True

    def draw(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator)

    texts = draw(config.text_vocab_size, UTTERANCES, TEXT_TOKENS, k + 1) * mask
    codes = draw(config.audio_vocab_size, UTTERANCES, FRAMES, k)
    return Speech([Prompt.build(text, mask) for text in texts], [*codes])


def demo_speech() -> tuple[CsmModel, Speech]:
    """The built-in voice in float32, and sentences spoken by both of its speakers."""
    engine = load_engine("demo", device="cpu", dtype="float32", max_batch_size=1)
    requests = [
        Request(text=text, speaker=speaker, sampling=SamplingParams(seed=seed), max_frames=150)
        for speaker in (0, 1)
        for seed, text in enumerate(SENTENCES)
    ]
    codes = [torch.from_numpy(speak(engine, request).codes) for request in requests]
    return engine.model, Speech([engine.prepare(request) for request in requests], codes)


def teacher_forced(model: CsmModel, speech: Speech) -> Logits:
    """The model's logits for each code of `speech`, given everything before it."""
    hidden, following = [], []
    for frames, states in _backbone_steps(model, speech):
        hidden.append(states)
        following.append(frames)
    spoken = [states[: len(frames)] for states, frames in zip(hidden, following, strict=True)]
    return Logits(
        ops.linear(torch.cat(hidden), model.weights.code0_head).float(),
        depth_logits(model, torch.cat(spoken), torch.cat(following)).flatten(0, 1),
    )


def _backbone_steps(model: CsmModel, speech: Speech) -> Iterator[tuple[Tensor, Tensor]]:
    """Runs the backbone step by step over all utterances.

    Yields:
        frames `[B, K]`: the next frame of every utterance that has one; and hidden states
        `[B + ended, C]`: first those that predict these frames, then those after the last frames
        of utterances that end here.
    """
    order = sorted(range(len(speech.codes)), key=lambda i: -len(speech.codes[i]))
    prompts, codes = ([part[i] for i in order] for part in speech)
    cache = KvCache(model.config.backbone, len(prompts), model.dtype, model.device)
    sequences = [CacheSequence() for _ in prompts]
    batch = CacheBatch.prefill(cache, sequences, [len(p.frames) for p in prompts])
    frames = torch.cat([prompt.frames for prompt in prompts])
    mask = torch.cat([prompt.mask for prompt in prompts])
    for step in range(len(codes[0]) + 1):
        hidden = model.backbone_step(frames, mask, batch, cache)
        following = [c[step] for c in codes if step < len(c)]
        if not following:
            yield codes[0][:0], hidden
            return
        yield torch.stack(following), hidden
        frames, mask = model.next_inputs(torch.stack(following))
        batch = CacheBatch.decode(cache, sequences[: len(following)])


def depth_logits(model: CsmModel, hidden: Tensor, codes: Tensor) -> Tensor:
    """The depth decoder's logits, each codebook's given the codes of the previous codebooks.

    Args:
        model: the model whose depth decoder runs.
        hidden: `[B, C]`, from `backbone_step`.
        codes: `[B, K]` int64.

    Returns:
        `[B, K - 1, V]` float32.
    """
    w, config = model.weights, model.config
    # Runs as an ordinary transformer: the same as `decode_depth`, which also samples each code.
    depth = CsmModel(replace(config, backbone=config.depth), replace(w, backbone=w.depth))
    cache = KvCache(config.depth, len(hidden), model.dtype, model.device)
    sequences = [CacheSequence() for _ in hidden]
    projected, logits = ops.linear(hidden, w.projection), []
    for position in range(config.num_codebooks):
        x = projected
        if position:
            row = (position - 1) * config.audio_vocab_size + codes[:, position - 1]
            x = w.depth_audio_rows[row]
        batch = CacheBatch.decode(cache, sequences)
        x = ops.decode_backbone(**depth.backbone_arguments(x, batch, cache))
        if position:
            head = w.code_heads[position - 1]
            logits.append(ops.linear(x, head)[:, : config.audio_vocab_size].float())
    return torch.stack(logits, 1)
