"""Every op at CSM-1B's shapes: time, bytes or operations per second, share of the roofline.

The peer is plain torch: what one would write without this library, on the same tensors (on dense
keys and values instead of pages, on the bfloat16 weight instead of a packed one).
"""

import functools
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import roofline
import torch
import torch.nn.functional as F
from csm_1b import CSM_1B, num_tensor_bytes, transformer_bytes
from report import Report
from torch import Tensor

from vox_serve.csm_weights import PACKINGS, CsmWeights
from vox_serve.kv_cache import CacheBatch, CacheSequence, KvCache
from vox_serve.model import CsmModel
from vox_serve.model_config import CsmConfig
from vox_serve.sampling import SamplingParams, SamplingRows
from voxkern import ops
from voxkern.backend import implementation
from voxkern.quantize import FORMATS, pack, packed_shape

C, HEADS, KV_HEADS, D, FFN, V, K = 2048, 32, 8, 64, 8192, 2051, 32
TEXT_VOCAB = 128256
CACHED, PROMPT, PAGE = 512, 256, 16
ROTATE_BYTES = 256 << 20
"""Inputs rotate through so much memory, several times a last-level cache."""
OPENMP_SPIN_S = 0.01
"""After a parallel op of torch's, its threads spin for some milliseconds and hold their cores."""


@dataclass
class Case:
    """One op at one shape.

    Attributes:
        op: its name.
        shape: for the reader.
        inputs: makes one set of inputs; sets beyond the first are made to defeat the caches.
        ours, torch: called with one set; torch is None if there is nothing to compare with.
        num_bytes: read and written at least once, per call.
        flops: operations per call.
        multiplied: what the operations are on, if not the dtype of the run.
    """

    op: str
    shape: str
    inputs: Callable[[], tuple]
    ours: Callable
    torch: Callable | None
    num_bytes: float
    flops: float = 0
    multiplied: torch.dtype | None = None


def cases(dtype: torch.dtype, batch: int) -> list[Case]:
    """All ops for `batch` sequences, each with `CACHED` positions."""
    e, b = dtype.itemsize, batch
    new = lambda *shape: torch.randn(shape).to(dtype)  # noqa: E731
    out = [
        Case(
            "rms_norm",
            f"[{b}, {C}]",
            lambda: (new(b, C), new(C)),
            lambda x, w: ops.rms_norm(x, w, 1e-5),
            lambda x, w: F.rms_norm(x, (C,), w, 1e-5),
            e * (2 * b * C + C),
        ),
        Case(
            "add_rms_norm",
            f"[{b}, {C}]",
            lambda: (new(b, C), new(b, C), new(C)),
            lambda x, r, w: ops.add_rms_norm(x, r, w, 1e-5),
            lambda x, r, w: F.rms_norm(r.add_(x), (C,), w, 1e-5),
            e * (4 * b * C + C),
        ),
        Case(
            "silu_mul",
            f"[{b}, 2 x {FFN}]",
            lambda: (new(b, 2 * FFN),),
            ops.silu_mul,
            lambda x: F.silu(x[:, :FFN]) * x[:, FFN:],
            e * 3 * b * FFN,
        ),
        _append_kv(dtype, b),
        _decode_attention(dtype, b),
        _embed_frames(dtype, b),
        _sample_tokens(b, "top-k 50", top_k=50),
        _sample_tokens(b, "top-p 0.9", top_p=0.9),
    ]
    shapes = [("qkv", 3072, C), ("o", C, C), ("gate_up", 2 * FFN, C), ("down", C, FFN)]
    shapes += [("head", V, C), ("depth gate_up", 2 * FFN, 1024), ("depth down", 1024, FFN)]
    out += [_linear(dtype, b, *shape) for shape in shapes]
    if dtype == torch.bfloat16:
        out += [_packed_linear(b, f, *shape) for f in FORMATS for shape in shapes]
    if b == 1:
        out.append(_linear(dtype, PROMPT, "gate_up, prompt", 2 * FFN, C))
        out.append(_prefill_attention(dtype))
    for quantize in PACKINGS if dtype == torch.bfloat16 else ("none",):
        out += [_decode_backbone(dtype, b, quantize), _decode_depth(dtype, b, quantize)]
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
    """Against torch on the bfloat16 weight."""

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


def _pages(dtype: torch.dtype, b: int, length: int) -> tuple[Tensor, ...]:
    per_sequence = -(-length // PAGE)
    k, v = torch.randn(2, b * per_sequence, KV_HEADS, PAGE, D).to(dtype)
    table = torch.randperm(b * per_sequence, dtype=torch.int32).view(b, per_sequence)
    return k, v, table


def _append_kv(dtype: torch.dtype, b: int) -> Case:
    rope = torch.randn(2048, D)

    def inputs():
        k_pages, v_pages, table = _pages(dtype, b, CACHED)
        qkv = torch.randn(b, HEADS + 2 * KV_HEADS, D).to(dtype)
        positions = torch.full((b,), CACHED - 1)
        slots = table[:, -1].long() * PAGE + PAGE - 1
        return *qkv.split((HEADS, KV_HEADS, KV_HEADS), 1), rope, positions, slots, k_pages, v_pages

    def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        half = torch.cat((-x[..., D // 2 :], x[..., : D // 2]), -1)
        return x * cos + half * sin

    def torch_way(q, k, v, rope, positions, slots, k_pages, v_pages):
        row = rope[positions][:, None].to(q.dtype)
        cos, sin = row[..., : D // 2].repeat(1, 1, 2), row[..., D // 2 :].repeat(1, 1, 2)
        q.copy_(rotate(q, cos, sin))
        page, offset = slots // PAGE, slots % PAGE
        k_pages[page, :, offset] = rotate(k, cos, sin)
        v_pages[page, :, offset] = v

    num_bytes = dtype.itemsize * b * D * (2 * HEADS + 4 * KV_HEADS)
    return Case("append_kv", f"{b} tokens", inputs, ops.append_kv, torch_way, num_bytes)


def _decode_attention(dtype: torch.dtype, b: int) -> Case:
    lengths = torch.full((b,), CACHED, dtype=torch.int32)

    def inputs():
        k_pages, v_pages, table = _pages(dtype, b, CACHED)
        dense = [
            p[table.long()].transpose(2, 3).reshape(b, CACHED, KV_HEADS, D).transpose(1, 2)
            for p in (k_pages, v_pages)
        ]
        return torch.randn(b, HEADS, D).to(dtype), k_pages, v_pages, table, *dense

    return Case(
        "decode_attention",
        f"{b} x {CACHED} keys",
        inputs,
        lambda q, k, v, t, *_: ops.decode_attention(q, k, v, t, lengths, D**-0.5),
        lambda q, _k, _v, _t, k, v: F.scaled_dot_product_attention(
            q[:, :, None], k, v, enable_gqa=True
        ),
        dtype.itemsize * b * (2 * CACHED * KV_HEADS * D + 2 * HEADS * D),
        4.0 * b * CACHED * HEADS * D,
    )


def _prefill_attention(dtype: torch.dtype) -> Case:
    lengths = torch.tensor([PROMPT], dtype=torch.int32)
    bounds = torch.tensor([0, PROMPT], dtype=torch.int32)

    def inputs():
        k_pages, v_pages, table = _pages(dtype, 1, PROMPT)
        dense = [
            p[table.long()].transpose(2, 3).reshape(1, PROMPT, KV_HEADS, D).transpose(1, 2)
            for p in (k_pages, v_pages)
        ]
        return torch.randn(PROMPT, HEADS, D).to(dtype), k_pages, v_pages, table, *dense

    return Case(
        "prefill_attention",
        f"{PROMPT} tokens",
        inputs,
        lambda q, k, v, t, *_: ops.prefill_attention(q, k, v, t, bounds, lengths, D**-0.5),
        lambda q, _k, _v, _t, k, v: F.scaled_dot_product_attention(
            q.transpose(0, 1)[None], k, v, is_causal=True, enable_gqa=True
        ),
        dtype.itemsize * PROMPT * D * 2 * (HEADS + KV_HEADS),
        2.0 * PROMPT * (PROMPT + 1) * HEADS * D,
    )


def _embed_frames(dtype: torch.dtype, b: int) -> Case:
    audio = torch.empty(K * V, C, dtype=dtype).fill_(0.01)
    text = torch.empty(TEXT_VOCAB // 8, C, dtype=dtype).fill_(0.01)
    offsets = torch.arange(K) * V
    mask = torch.ones(b, K + 1, dtype=torch.bool)

    def torch_way(frames):
        rows = torch.cat((audio[frames[:, :K] + offsets], text[frames[:, K:]]), 1)
        return (rows * mask[..., None]).sum(1)

    return Case(
        "embed_frames",
        f"{b} frames",
        lambda: (torch.randint(0, V, (b, K + 1)),),
        lambda frames: ops.embed_frames(frames, mask, audio, text),
        torch_way,
        dtype.itemsize * b * C * (K + 2),
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


def _sample_tokens(b: int, label: str, top_k: int = 0, top_p: float = 1.0) -> Case:
    rows = _rows(b, top_k, top_p)
    penalty, history = torch.ones(b), torch.full((b, 16), -1)

    def torch_way(logits):
        logits = logits.float() / 0.9
        if top_k:
            kth = logits.topk(top_k).values[:, -1:]
            logits = logits.masked_fill(logits < kth, -torch.inf)
        if top_p < 1:
            ordered, order = logits.sort(descending=True)
            mass = ordered.softmax(-1).cumsum(-1)
            drop = (mass - ordered.softmax(-1) >= top_p).scatter(1, order, mass >= top_p)
            logits = logits.masked_fill(drop, -torch.inf)
        return logits.softmax(-1).multinomial(1)[:, 0]

    return Case(
        "sample_tokens",
        f"[{b}, {V}] {label}",
        lambda: (torch.randn(b, V) * 3,),
        lambda logits: ops.sample_tokens(
            logits, repetition_penalty=penalty, history=history, codebook=1, **rows
        ),
        torch_way,
        4.0 * b * V,
    )


def _csm(layers: dict[str, int]) -> CsmConfig:
    """CSM-1B's shapes without the text table, and with fewer layers of one part."""
    config = replace(CsmConfig.from_json(CSM_1B), text_vocab_size=1)
    parts = {name: replace(getattr(config, name), num_layers=n) for name, n in layers.items()}
    return replace(config, **parts)


def _decode_backbone(dtype: torch.dtype, b: int, quantize: str = "none") -> Case:
    config = _csm({"depth": 1})

    def inputs():
        model = CsmModel(config, CsmWeights.random(config, dtype, quantize=quantize))
        cache = KvCache(config.backbone, b, dtype, model.device)
        sequences = [CacheSequence() for _ in range(b)]
        for sequence in sequences:
            cache.extend(sequence, CACHED - 1)
        batch = CacheBatch.decode(cache, sequences)
        for pages in (cache.k_pages, cache.v_pages):
            for layer in pages:
                layer.normal_()
        return model.backbone_arguments(torch.randn(b, C).to(dtype), batch, cache)

    def weights(quantize: str) -> int:
        empty = CsmWeights.empty(config, dtype, "meta", quantize)
        return transformer_bytes(empty.backbone)

    keys = dtype.itemsize * config.backbone.num_layers * b * 2 * CACHED * KV_HEADS * D
    packed = quantize != "none"
    return Case(
        "decode_backbone",
        f"{quantize} {b} x {CACHED} keys" if packed else f"{b} x {CACHED} keys",
        inputs,
        ops.decode_backbone,
        None if packed else implementation("decode_backbone", "reference"),
        weights(quantize) + keys,
        2.0 * b * weights("none") / dtype.itemsize,
        torch.int8 if packed else dtype,
    )


def _decode_depth(dtype: torch.dtype, b: int, quantize: str = "none") -> Case:
    config = _csm({"backbone": 1})

    def inputs():
        model = CsmModel(config, CsmWeights.random(config, dtype, quantize=quantize))
        params = [SamplingParams(temperature=0.9, top_k=50)] * b
        rows = SamplingRows.of(params, range(b), model.device)
        return model.depth_arguments(torch.randn(b, C).to(dtype), torch.arange(b), rows)

    def weights(quantize: str) -> int:
        empty = CsmWeights.empty(config, dtype, "meta", quantize)
        once = num_tensor_bytes([empty.projection, empty.code_heads])
        return (K - 1) * transformer_bytes(empty.depth) + once

    packed = quantize != "none"
    return Case(
        "decode_depth",
        f"{quantize} {b} frames" if packed else f"{b} frames",
        inputs,
        ops.decode_depth,
        None if packed else implementation("decode_depth", "reference"),
        weights(quantize),
        2.0 * b * weights("none") / dtype.itemsize,
        torch.int8 if packed else dtype,
    )


def _time_ms(call: Callable, inputs: list[tuple], calls: int) -> float:
    start = time.perf_counter()
    for i in range(calls):
        call(*inputs[i % len(inputs)])
    return (time.perf_counter() - start) / calls * 1e3


def measure(case: Case, rounds: int = 7) -> tuple[float, float, float]:
    """Median milliseconds of ours and of torch, NaN without one, and bytes read per second, all
    timed in turn."""
    first = case.inputs()
    copies = max(1, min(64, int(ROTATE_BYTES // case.num_bytes)))
    inputs = [first] + [case.inputs() for _ in range(copies - 1)]
    timed = [f for f in (case.ours, case.torch) if f]
    calls = [max(1, min(200, int(20 / _time_ms(f, inputs, 2)))) for f in timed]
    times: list[list[float]] = [[] for _ in timed]
    bandwidths = []
    for _ in range(rounds):
        bandwidths.append(roofline.read_bandwidth())
        for f, n, seen in zip(timed, calls, times, strict=True):
            time.sleep(OPENMP_SPIN_S)
            seen.append(_time_ms(f, inputs, n))
    ours, peer = (statistics.median(seen) for seen in (*times, [math.nan])[:2])
    return ours, peer, statistics.median(bandwidths)


def run(report: Report, dtypes: list[torch.dtype], batches: list[int], only: list | None) -> None:
    table = report.table(
        "kernels",
        ["op", "shape", "dtype", "ms", "GB/s", "Gop/s", "% roofline", "torch ms", "x torch"],
    )
    for dtype in dtypes:
        for batch in batches:
            for case in cases(dtype, batch):
                if only and case.op not in only:
                    continue
                rate = roofline.median_of(roofline.multiply_rate, 3, case.multiplied or dtype)
                ms, peer_ms, bandwidth = measure(case)
                floor_ms = max(case.num_bytes / bandwidth, case.flops / rate) * 1e3
                table.add(
                    *(case.op, case.shape, str(dtype).removeprefix("torch.")),
                    *(ms, case.num_bytes / ms / 1e6, case.flops / ms / 1e6),
                    *(100 * floor_ms / ms, peer_ms, peer_ms / ms),
                )
