"""What packing the weights does to the logits: of codebook 0, and of all the others.

Teacher-forced: every packing is given the same text and codes, so that its logits are compared with
those of plain float32 weights position by position; an error early in an utterance is not counted
again in all that follows. The codebooks after the first see hidden states of the same packing's
backbone, as they do in use.

- "random": CSM-1B's sizes, random weights, text and codes. Its logits are all but flat, so a small
  error already turns the largest one: top-1 agreement there is a bound, not what speech would show.
- "demo": the built-in voice, on what it says itself in float32 with the default sampling.

`KL`: the divergence of the packed model's distribution from the plain float32 one's, in nats, mean
over positions. `top-1 %`: positions whose largest logit stays the same. `MB read`: the weights of
one frame. Whether speech suffers, a recogniser says: `tools/train_voice/evaluate.py --quantize`.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import torch
from csm_1b_shapes import CSM_1B, TEXT_ROWS, frame_bytes
from report import Report
from torch import Tensor

from vox_serve.csm_weights import MATRICES, PACKINGS, CsmWeights, TransformerWeights
from vox_serve.engine import Prompt, Request
from vox_serve.kv_cache import CacheBatch, CacheSequence, KvCache
from vox_serve.loading import load_engine
from vox_serve.model import CsmModel
from vox_serve.model_config import CsmConfig
from vox_serve.sampling import SamplingParams
from vox_serve.say import speak
from voxkern import ops
from voxkern.quantize import pack

UTTERANCES, TEXT_TOKENS, FRAMES = 8, 16, 16
"""Of the random ones: how many, and the size of each."""

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
"""What `--quantize` offers, and its neighbours, in `PACKINGS`' terms."""


class Speech(NamedTuple):
    """Utterances that every packing is given.

    Attributes:
        prompts: their texts.
        codes: `[N, K]` int64 each, what follows.
    """

    prompts: list[Prompt]
    codes: list[Tensor]


class Logits(NamedTuple):
    """float32 logits at every position.

    Attributes:
        code0: `[P, V]`, of each utterance's frames and of the one behind its last.
        depth: `[Q, V]`, of each frame's codebooks 1 to K - 1.
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
    # What `--dtype auto` gives a model of its size.
    _compare(table.add, "demo", demo, speech, torch.float32)


def _compare(add: Callable, name: str, exact: CsmModel, speech: Speech, dtype: torch.dtype) -> None:
    """A row for each packing with activations of `dtype`, and one of plain bfloat16."""
    wanted = teacher_forced(exact, speech)
    pack_once, cast_once = cache(pack), cache(Tensor.to)
    runs = [("none", torch.bfloat16)]
    runs += [(variant, dtype) for variant in VARIANTS if variant != "none"]
    for variant, activations in runs:
        weights = packed(exact.weights, VARIANTS[variant], activations, pack_once, cast_once)
        logits = teacher_forced(CsmModel(exact.config, weights), speech)
        read = frame_bytes(weights).total / 1e6
        errors = [x for pair in zip(wanted, logits, strict=True) for x in divergence(*pair)]
        add(name, variant, str(activations).removeprefix("torch."), read, *errors)


def divergence(wanted: Tensor, logits: Tensor) -> tuple[float, float]:
    """Mean KL divergence in nats, and the percentage of rows with the same largest logit.

    Args:
        wanted, logits: `[P, V]`.
    """
    p, q = wanted.double().log_softmax(-1), logits.double().log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1).mean()
    same = (wanted.argmax(-1) == logits.argmax(-1)).double().mean()
    return float(kl), 100 * float(same)


def packed(
    weights: CsmWeights,
    packing: dict[str, str],
    dtype: torch.dtype,
    pack: Callable[[Tensor, str], Tensor] = pack,
    cast: Callable[[Tensor, torch.dtype], Tensor] = Tensor.to,
) -> CsmWeights:
    """Plain weights, packed as `packing` says, the others of `dtype`."""

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
    """float32, each matrix with noise of its own.

    Those of `CsmWeights.random` share theirs: heads would find the embeddings again.
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
    return Speech([Prompt(text, mask) for text in texts], [*codes])


def demo_speech() -> tuple[CsmModel, Speech]:
    """The built-in voice in float32, and what both of its speakers say."""
    engine = load_engine("demo", device="cpu", dtype="float32", max_batch_size=1)
    requests = [
        Request(text=text, speaker=speaker, sampling=SamplingParams(seed=seed), max_frames=150)
        for speaker in (0, 1)
        for seed, text in enumerate(SENTENCES)
    ]
    codes = [torch.from_numpy(speak(engine, request)[1]) for request in requests]
    return engine.model, Speech([engine.prepare(request) for request in requests], codes)


def teacher_forced(model: CsmModel, speech: Speech) -> Logits:
    """The model's logits for each code of `speech`, given all that comes before it."""
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
    """Step by step, the next frames of the utterances that have one, and hidden states.

    Yields:
        frames `[B, K]`, and hidden states `[B + ended, C]`: first those before the frames, then
        those behind the last frames of utterances that end here.
    """
    order = sorted(range(len(speech.codes)), key=lambda i: -len(speech.codes[i]))
    prompts, codes = ([part[i] for i in order] for part in speech)
    cache = KvCache(model.config.backbone, len(prompts), model.dtype, model.device)
    sequences = [CacheSequence() for _ in prompts]
    batch = CacheBatch.prefill(cache, sequences, [len(p.frames) for p in prompts])
    frames, mask = (torch.cat(tensors) for tensors in zip(*prompts, strict=True))
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
    """The depth decoder's logits, each codebook's given the codes of those before it.

    Args:
        model: whose depth decoder.
        hidden: `[B, C]`, from `backbone_step`.
        codes: `[B, K]` int64.

    Returns:
        `[B, K - 1, V]` float32.
    """
    w, config = model.weights, model.config
    # A transformer like any other: `decode_depth` does the same, but draws each code.
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
