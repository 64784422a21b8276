"""Benchmark cases: every op at a model's shapes, and the code it is compared with.

The peer is plain torch, the code one would write without this library, on the same tensors (dense
keys and values instead of pages, the bfloat16 weight instead of a packed one). On a GPU the whole
decoders have no peer: their reference would launch thousands of small kernels. codec_cases.py has
the codec's ops.
"""

import functools
import inspect
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from kernel_case import Case
from torch import Tensor

from vox_serve.csm_weights import PACKINGS, CsmWeights
from vox_serve.frame_bytes import num_tensor_bytes, transformer_bytes
from vox_serve.kv_cache import CacheBatch, CacheSequence, KvCache
from vox_serve.model import PERSISTENT_ROWS, CsmModel
from vox_serve.model_config import CsmConfig, TransformerConfig
from vox_serve.sampling import SamplingParams, SamplingRows
from voxkern import ops
from voxkern.backend import implementation
from voxkern.persistent import decode_depth_persistent
from voxkern.quantize import FORMATS, pack, packed_shape

CACHED, PROMPT, PAGE = 512, 256, 16


def cases(config: CsmConfig, dtype: torch.dtype, batch: int, device: str = "cpu") -> list[Case]:
    """All ops at the shapes of `config`, for `batch` sequences of `CACHED` positions each.

    Tensors are made on torch's default device, models on `device`, which must be the same.
    """
    e, b = dtype.itemsize, batch
    c, depth = config.backbone, config.depth
    width, ffn = c.dim, c.ffn_dim
    new = lambda *shape: torch.randn(shape).to(dtype)  # noqa: E731
    out = [
        Case(
            "rms_norm",
            f"[{b}, {width}]",
            lambda: (new(b, width), new(width)),
            lambda x, w: ops.rms_norm(x, w, 1e-5),
            lambda x, w: F.rms_norm(x, (width,), w, 1e-5),
            e * (2 * b * width + width),
        ),
        Case(
            "add_rms_norm",
            f"[{b}, {width}]",
            lambda: (new(b, width), new(b, width), new(width)),
            lambda x, r, w: ops.add_rms_norm(x, r, w, 1e-5),
            lambda x, r, w: F.rms_norm(r.add_(x), (width,), w, 1e-5),
            e * (4 * b * width + width),
        ),
        Case(
            "silu_mul",
            f"[{b}, 2 x {ffn}]",
            lambda: (new(b, 2 * ffn),),
            ops.silu_mul,
            lambda x: F.silu(x[:, :ffn]) * x[:, ffn:],
            e * 3 * b * ffn,
        ),
        _append_kv(c, dtype, b),
        _decode_attention(c, dtype, b, CACHED),
        _decode_attention(c, dtype, b, c.max_positions),
        _embed_frames(config, dtype, b),
        _sample_tokens(config.audio_vocab_size, b, "top-k 50", top_k=50),
        _sample_tokens(config.audio_vocab_size, b, "top-p 0.9", top_p=0.9),
    ]
    shapes = [
        ("qkv", (c.num_heads + 2 * c.num_kv_heads) * c.head_dim, width),
        ("o", width, c.num_heads * c.head_dim),
        ("gate_up", 2 * ffn, width),
        ("down", width, ffn),
        ("head", config.audio_vocab_size, width),
        ("depth gate_up", 2 * depth.ffn_dim, depth.dim),
        ("depth down", depth.dim, depth.ffn_dim),
    ]
    out += [_linear(dtype, b, *shape) for shape in shapes]
    if dtype == torch.bfloat16:
        out += [_packed_linear(b, f, *shape) for f in FORMATS for shape in shapes]
    if b == 1:
        out.append(_linear(dtype, PROMPT, "gate_up, prompt", 2 * ffn, width))
        out.append(_prefill_attention(c, dtype))
    for quantize in PACKINGS if dtype == torch.bfloat16 else ("none",):
        out += [
            _decode_backbone(config, dtype, b, quantize, device),
            _decode_depth(config, dtype, b, quantize, device),
        ]
    return out


def _linear(dtype: torch.dtype, m: int, name: str, n: int, c: int) -> Case:
    return Case(
        "linear",
        f"{name} [{m}, {c}] x {n}",
        lambda: (torch.randn(m, c).to(dtype), (torch.randn(n, c) / math.sqrt(c)).to(dtype)),
        ops.linear,
        F.linear,
        dtype.itemsize * (n * c + m * c + m * n),
        2.0 * m * n * c,
    )


def _packed_linear(m: int, format: str, name: str, n: int, c: int) -> Case:
    """`linear` with packed weights; the peer is torch with the bfloat16 weight."""

    @functools.cache
    def weights() -> tuple[Tensor, Tensor]:
        plain = (torch.randn(n, c) / math.sqrt(c)).bfloat16()
        return pack(plain, format), plain

    return Case(
        "linear",
        f"{format} {name} [{m}, {c}] x {n}",
        lambda: (torch.randn(m, c).bfloat16(), *(w.clone() for w in weights())),
        lambda x, packed, _: ops.linear(x, packed),
        lambda x, _, plain: F.linear(x, plain),
        math.prod(packed_shape((n, c), format)) + 2 * m * (c + n),
        2.0 * m * n * c,
        torch.int8,
    )


def _pages(c: TransformerConfig, dtype: torch.dtype, b: int, length: int) -> tuple[Tensor, ...]:
    per_sequence = -(-length // PAGE)
    shape = b * per_sequence, c.num_kv_heads, PAGE, c.head_dim
    k, v = (torch.randn(shape).to(dtype) for _ in range(2))
    table = torch.randperm(b * per_sequence, dtype=torch.int32).view(b, per_sequence)
    return k, v, table


def _dense(pages: Tensor, table: Tensor) -> Tensor:
    """Pages as `[B, Hkv, length, D]`, contiguous, for torch's own attention."""
    b, head_dim = len(table), pages.shape[-1]
    heads = pages[table.long()].transpose(1, 2)
    return heads.reshape(b, pages.shape[1], -1, head_dim)


def _append_kv(c: TransformerConfig, dtype: torch.dtype, b: int) -> Case:
    half_width = c.head_dim // 2
    rope = torch.randn(c.max_positions, c.head_dim)

    def inputs():
        k_pages, v_pages, table = _pages(c, dtype, b, CACHED)
        heads = c.num_heads, c.num_kv_heads, c.num_kv_heads
        qkv = torch.randn(b, sum(heads), c.head_dim).to(dtype)
        positions = torch.full((b,), CACHED - 1)
        slots = table[:, -1].long() * PAGE + PAGE - 1
        return *qkv.split(heads, 1), rope, positions, slots, k_pages, v_pages

    def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        half = torch.cat((-x[..., half_width:], x[..., :half_width]), -1)
        return x * cos + half * sin

    def plain_torch(q, k, v, rope, positions, slots, k_pages, v_pages):
        row = rope[positions][:, None].to(q.dtype)
        cos, sin = (part.repeat(1, 1, 2) for part in row.chunk(2, -1))
        q.copy_(rotate(q, cos, sin))
        page, offset = slots // PAGE, slots % PAGE
        k_pages[page, :, offset] = rotate(k, cos, sin)
        v_pages[page, :, offset] = v

    num_bytes = dtype.itemsize * b * c.head_dim * (2 * c.num_heads + 4 * c.num_kv_heads)
    return Case("append_kv", f"{b} tokens", inputs, ops.append_kv, plain_torch, num_bytes)


def _decode_attention(c: TransformerConfig, dtype: torch.dtype, b: int, keys: int) -> Case:
    lengths = torch.full((b,), keys, dtype=torch.int32)

    def inputs():
        k_pages, v_pages, table = _pages(c, dtype, b, keys)
        dense = _dense(k_pages, table), _dense(v_pages, table)
        return torch.randn(b, c.num_heads, c.head_dim).to(dtype), k_pages, v_pages, table, *dense

    return Case(
        "decode_attention",
        f"{b} x {keys} keys",
        inputs,
        lambda q, k, v, t, *_: ops.decode_attention(q, k, v, t, lengths, c.head_dim**-0.5),
        lambda q, _k, _v, _t, k, v: F.scaled_dot_product_attention(
            q[:, :, None], k, v, enable_gqa=True
        ),
        dtype.itemsize * b * c.head_dim * 2 * (keys * c.num_kv_heads + c.num_heads),
        4.0 * b * keys * c.num_heads * c.head_dim,
    )


def _prefill_attention(c: TransformerConfig, dtype: torch.dtype) -> Case:
    lengths = torch.tensor([PROMPT], dtype=torch.int32)
    bounds = torch.tensor([0, PROMPT], dtype=torch.int32)

    def inputs():
        k_pages, v_pages, table = _pages(c, dtype, 1, PROMPT)
        dense = _dense(k_pages, table), _dense(v_pages, table)
        q = torch.randn(PROMPT, c.num_heads, c.head_dim).to(dtype)
        return q, k_pages, v_pages, table, *dense

    return Case(
        "prefill_attention",
        f"{PROMPT} tokens",
        inputs,
        lambda q, k, v, t, *_: ops.prefill_attention(q, k, v, t, bounds, lengths, c.head_dim**-0.5),
        lambda q, _k, _v, _t, k, v: F.scaled_dot_product_attention(
            q.transpose(0, 1)[None], k, v, is_causal=True, enable_gqa=True
        ),
        dtype.itemsize * PROMPT * c.head_dim * 2 * (c.num_heads + c.num_kv_heads),
        2.0 * PROMPT * (PROMPT + 1) * c.num_heads * c.head_dim,
    )


def _embed_frames(config: CsmConfig, dtype: torch.dtype, b: int) -> Case:
    k, vocab, width = config.num_codebooks, config.audio_vocab_size, config.backbone.dim
    audio = torch.empty(k * vocab, width, dtype=dtype).fill_(0.01)
    text = torch.empty(8 * vocab, width, dtype=dtype).fill_(0.01)
    offsets = torch.arange(k) * vocab
    mask = torch.ones(b, k + 1, dtype=torch.bool)

    def plain_torch(frames):
        rows = torch.cat((audio[frames[:, :k] + offsets], text[frames[:, k:]]), 1)
        return (rows * mask[..., None]).sum(1)

    return Case(
        "embed_frames",
        f"{b} frames",
        lambda: (torch.randint(0, vocab, (b, k + 1)),),
        lambda frames: ops.embed_frames(frames, mask, audio, text),
        plain_torch,
        dtype.itemsize * b * width * (k + 2),
    )


def _rows(b: int, top_k: int = 0, top_p: float = 1.0) -> dict[str, Tensor]:
    return {
        "temperature": torch.full((b,), 0.9),
        "top_k": torch.full((b,), top_k, dtype=torch.int32),
        "top_p": torch.full((b,), top_p),
        "min_p": torch.zeros(b),
        "seeds": torch.arange(b),
        "frames": torch.zeros(b, dtype=torch.int64),
    }


def _sample_tokens(vocab: int, b: int, label: str, top_k: int = 0, top_p: float = 1.0) -> Case:
    rows = _rows(b, top_k, top_p)
    penalty, history = torch.ones(b), torch.full((b, 16), -1)

    def plain_torch(logits):
        logits = logits.float() / 0.9
        if top_k:
            kth = logits.topk(top_k).values[:, -1:]
            logits = logits.masked_fill(logits < kth, -torch.inf)
        if top_p < 1:
            ordered, order = logits.sort(descending=True)
            share = ordered.softmax(-1)
            drop = share.cumsum(-1) - share >= top_p
            logits = logits.masked_fill(drop.scatter(1, order, drop), -torch.inf)
        return logits.softmax(-1).multinomial(1)[:, 0]

    return Case(
        "sample_tokens",
        f"[{b}, {vocab}] {label}",
        lambda: (torch.randn(b, vocab) * 3,),
        lambda logits: ops.sample_tokens(
            logits, repetition_penalty=penalty, history=history, codebook=1, **rows
        ),
        plain_torch,
        4.0 * b * vocab,
    )


def _one_layer(config: CsmConfig, part: str) -> CsmConfig:
    """`config` without the text table and with a single layer in `part`."""
    return replace(
        config, text_vocab_size=1, **{part: replace(getattr(config, part), num_layers=1)}
    )


def _decode_backbone(
    config: CsmConfig, dtype: torch.dtype, b: int, quantize: str, device: str
) -> Case:
    config = _one_layer(config, "depth")
    c = config.backbone

    def inputs():
        model = CsmModel(config, CsmWeights.random(config, dtype, device=device, quantize=quantize))
        cache = KvCache(c, b, dtype, model.device)
        sequences = [CacheSequence() for _ in range(b)]
        for sequence in sequences:
            cache.extend(sequence, CACHED - 1)
        batch = CacheBatch.decode(cache, sequences)
        for pages in (cache.k_pages, cache.v_pages):
            for layer in pages:
                layer.normal_()
        x = torch.randn(b, c.dim).to(dtype)
        return _positional(ops.decode_backbone, model.backbone_arguments(x, batch, cache))

    def weights(quantize: str) -> int:
        empty = CsmWeights.empty(config, dtype, "meta", quantize)
        return transformer_bytes(empty.backbone)

    keys = dtype.itemsize * c.num_layers * b * 2 * CACHED * c.num_kv_heads * c.head_dim
    packed = quantize != "none"
    return Case(
        "decode_backbone",
        f"{quantize} {b} x {CACHED} keys" if packed else f"{b} x {CACHED} keys",
        inputs,
        ops.decode_backbone,
        None if packed or device != "cpu" else implementation("decode_backbone", "reference"),
        weights(quantize) + keys,
        2.0 * b * weights("none") / dtype.itemsize,
        torch.int8 if packed else dtype,
    )


def _decode_depth(
    config: CsmConfig, dtype: torch.dtype, b: int, quantize: str, device: str
) -> Case:
    config = _one_layer(config, "backbone")

    def inputs():
        model = CsmModel(config, CsmWeights.random(config, dtype, device=device, quantize=quantize))
        params = [SamplingParams(temperature=0.9, top_k=50)] * b
        rows = SamplingRows.of(params, range(b), model.device)
        hidden = torch.randn(b, config.backbone.dim).to(dtype)
        code0 = torch.arange(b) % config.audio_vocab_size
        return _positional(ops.decode_depth, model.depth_arguments(hidden, code0, rows))

    def weights(quantize: str) -> int:
        empty = CsmWeights.empty(config, dtype, "meta", quantize)
        once = num_tensor_bytes([empty.projection, empty.code_heads])
        return (config.num_codebooks - 1) * transformer_bytes(empty.depth) + once

    packed = quantize != "none"
    return Case(
        "decode_depth",
        f"{quantize} {b} frames" if packed else f"{b} frames",
        inputs,
        ops.decode_depth,
        None if packed or device != "cpu" else implementation("decode_depth", "reference"),
        weights(quantize),
        2.0 * b * weights("none") / dtype.itemsize,
        torch.int8 if packed else dtype,
        persistent=decode_depth_persistent if b <= PERSISTENT_ROWS else None,
    )


def _positional(op: Callable, arguments: dict[str, Any]) -> tuple:
    """Keyword arguments in the order of the op's signature."""
    return inspect.signature(op).bind(**arguments).args
