"""A position has the same keys, values and hidden state, bit for bit, whichever path computes it:
one prefill, a prefill in chunks, or a decode step, alone or in a batch. So a prefix cache may mix
pages of prompts and of generated frames, and a cache hit never changes a code."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from kv_testing import GARBAGE_PAGE, paged, random_sequences
from op_cases.decode_backbone import MATRICES, PACKED_SIZES, SIZES, Sizes, make, packed
from ops_testing import Target, assert_close, targets
from voxkern.layers import LlamaLayers

ALIGNED = Sizes(L=2, C=128, F=192, Hq=8, Hkv=2, D=64, S=16)
"""Sizes of which every kernel takes its fastest path."""
WIDE_HEADS = Sizes(L=2, C=64, F=64, Hq=2, Hkv=1, D=128, S=16)
SMALL = Sizes(L=1, C=32, F=32, Hq=2, Hkv=1, D=64, S=16)
NARROW_HEADS = Sizes(L=1, C=32, F=16, Hq=4, Hkv=1, D=32, S=5)
"""ALIGNED and SIZES[1] for SIMT, where each CUDA thread is a fiber."""
PRECISIONS = [
    (sizes, dtype, format)
    for dtype in (torch.float32, torch.bfloat16)
    for format, all_sizes in (
        ("none", [ALIGNED, WIDE_HEADS, SIZES[1], SIZES[2]]),
        ("int8", [ALIGNED, PACKED_SIZES[1]]),
        ("int4", [ALIGNED, PACKED_SIZES[1]]),
    )
    for sizes in all_sizes
]
IDS = [
    f"D{sizes.D}-{str(dtype).removeprefix('torch.')}-{format}"
    for sizes, dtype, format in PRECISIONS
]
BACKENDS = [
    *(target for target in targets() if str(target) == "native-cpu"),
    *(target for target in targets() if str(target) == "triton-cpu"),
    *(target for target in targets() if str(target) == "simt-cpu"),
    Target("reference", "cpu"),
]


def cases(backend: Target) -> list[tuple]:
    """Precisions in which the backend keeps the promise, with their names. Slow backends have one
    layer: a second one would only repeat a difference of the first."""
    named = list(zip(PRECISIONS, IDS, strict=True))
    if not backend.slow:
        return named
    reduced = {ALIGNED: SMALL, SIZES[1]: NARROW_HEADS} if backend.backend == "simt" else {}
    small = [((replace(reduced.get(p[0], p[0]), L=1), *p[1:]), name) for p, name in named]
    if backend.interpreted:
        return small
    return [(p, name) for p, name in small if not on_tensor_cores(*p[:2])]


def on_tensor_cores(sizes: Sizes, dtype: torch.dtype) -> bool:
    """CUDA's prefill_attention then rounds softmax weights to bfloat16, a decode step does not."""
    return dtype == torch.bfloat16 and sizes.D in (64, 128)


CASES = [
    pytest.param(backend, *precision, id=f"{backend}-{name}")
    for backend in BACKENDS
    for precision, name in cases(backend)
]


@dataclass
class Backbone:
    """Random weights, and the paths of `CsmModel.backbone_step`, run on one backend."""

    backend: Target
    sizes: Sizes
    dtype: torch.dtype
    format: str

    def __post_init__(self) -> None:
        packing = {} if self.format == "none" else dict.fromkeys(MATRICES, self.format)
        arguments = packed(make(self.sizes, self.dtype, [MAX_POSITIONS]), packing)
        names = LlamaLayers.__dataclass_fields__
        self.layers = LlamaLayers(**{name: arguments[name] for name in names})

    def random_inputs(self, tokens: int) -> Tensor:
        return torch.randn(tokens, self.sizes.C).to(self.dtype)

    def prefill(self, batch: list["Sequence"], new: list[int], pages: "Pages") -> list[Tensor]:
        """Computes the next new[b] positions of each sequence; returns their hidden states."""
        w, run = self.layers, self.backend.run
        starts = [sequence.length for sequence in batch]
        inputs = [s.inputs[s.length : s.length + n] for s, n in zip(batch, new, strict=True)]
        for sequence, n in zip(batch, new, strict=True):
            sequence.length += n
        positions = torch.cat([torch.arange(a, a + n) for a, n in zip(starts, new, strict=True)])
        slots = torch.cat([s.slots(a, a + n) for s, a, n in zip(batch, starts, new, strict=True)])
        page_table = pages.table(batch)
        seq_lens = torch.tensor([s.length for s in batch], dtype=torch.int32)
        cu_seqlens = torch.tensor([0, *new]).cumsum(0).int()
        residual = torch.cat(inputs)
        x = run("rms_norm", residual, w.attn_norm[0], w.eps)
        for i in range(len(w.qkv)):
            qkv = run("linear", x, w.qkv[i])[:, : w.qkv_rows]
            q, k, v = w.split_heads(qkv)
            cache = pages.k[i], pages.v[i]
            run("append_kv", q, k, v, w.rope_table, positions, slots, *cache)
            x = run(
                "prefill_attention",
                *(q, *cache, page_table, cu_seqlens, seq_lens, w.head_dim**-0.5),
            )
            x = run("linear", x.flatten(1), w.o[i])[:, : w.width].contiguous()
            x = run("add_rms_norm", x, residual, w.mlp_norm[i], w.eps)
            x = run("silu_mul", run("linear", x, w.gate_up[i]))
            x = run("linear", x, w.down[i])[:, : w.width].contiguous()
            next_norm = w.attn_norm[i + 1] if i + 1 < len(w.qkv) else w.norm
            x = run("add_rms_norm", x, residual, next_norm, w.eps)
        return list(x.split(new))

    def decode(self, batch: list["Sequence"], pages: "Pages") -> Tensor:
        """Computes the next position of each sequence; returns the hidden states `[B, C]`."""
        x = torch.stack([s.inputs[s.length] for s in batch])
        positions = torch.tensor([s.length for s in batch])
        slots = torch.cat([s.slots(s.length, s.length + 1) for s in batch])
        for sequence in batch:
            sequence.length += 1
        seq_lens = torch.tensor([s.length for s in batch], dtype=torch.int32)
        return self.backend.run(
            "decode_backbone",
            *(x, *vars(self.layers).values()),
            *(positions, slots, pages.k, pages.v, pages.table(batch), seq_lens),
        )


@dataclass
class Sequence:
    inputs: Tensor  # [tokens, C]
    pages: list[int]
    page_size: int
    length: int = 0  # positions computed

    def slots(self, begin: int, end: int) -> Tensor:
        at = torch.arange(begin, end)
        return torch.tensor(self.pages)[at // self.page_size] * self.page_size + at % self.page_size


class Pages:
    """Keys and values, NaN where nothing was written. Page numbers are a random permutation."""

    def __init__(self, backbone: Backbone, positions: int) -> None:
        s = backbone.sizes
        self.page_size = s.S
        count = positions // s.S + 1
        shape = (s.L, count, s.Hkv, s.S, s.D)
        self.k, self.v = (torch.full(shape, torch.nan, dtype=backbone.dtype) for _ in range(2))
        self.free = torch.randperm(count).tolist()

    def sequence(self, inputs: Tensor) -> Sequence:
        pages = [self.free.pop() for _ in range(-(-len(inputs) // self.page_size))]
        return Sequence(inputs, pages, self.page_size)

    def copy(self, sequence: Sequence, length: int, tokens: int) -> Sequence:
        """Another sequence of `tokens` tokens that has the first `length` positions computed."""
        other = self.sequence(sequence.inputs[:tokens])
        other.length = length
        for name in ("k", "v"):
            keys = self.read(name, sequence, length)
            at = other.slots(0, length)
            getattr(self, name)[:, at // self.page_size, :, at % self.page_size] = keys.transpose(
                0, 1
            )
        return other

    def read(self, name: str, sequence: Sequence, end: int, begin: int = 0) -> Tensor:
        """Keys or values of the positions begin .. end, `[L, positions, Hkv, D]`."""
        at = sequence.slots(begin, end)
        return getattr(self, name)[:, at // self.page_size, :, at % self.page_size].transpose(0, 1)

    def table(self, batch: list[Sequence]) -> Tensor:
        width = max(len(sequence.pages) for sequence in batch) + 1
        rows = [[*s.pages, *[GARBAGE_PAGE] * (width - len(s.pages))] for s in batch]
        return torch.tensor(rows, dtype=torch.int32)


MAX_POSITIONS = 640
LENGTHS = [0, 1, 2, 15, 16, 31, 32, 33, 63, 64, 65, 100, 127, 128, 129, 191, 255, 256, 257]
LONG_LENGTHS = [300, 383, 384, 385, 511, 512, 513, 599]
"""Cached lengths before the compared position: around every multiple at which a kernel starts
another block or split of keys."""


def lengths_for(backend: Target, sizes: Sizes) -> list[int]:
    if backend.backend == "reference":  # it has no blocks and no splits
        return [0, 1, 2, 7, 8, 9, 33, 100]
    if backend.backend == "simt":  # warps of 32 keys, splits of 128
        return [0, 1, 31, 32, 33, 127, 128, 129]
    if backend.interpreted:  # splits of 256 keys in widths of 33 to 64, of 128 in WIDE_HEADS'
        return LENGTHS if 32 < sizes.D <= 64 else [*LENGTHS[:15], 3, 5, 9, 17]
    return [*LENGTHS, *LONG_LENGTHS]


def assert_same(got: Tensor, expected: Tensor, where: str) -> None:
    assert not expected.isnan().any()
    if not torch.equal(got, expected):
        difference = (got.float() - expected.float()).abs().max().item()
        pytest.fail(f"{where}: differs by up to {difference:.3g}")


def row_counts(backend: Target, sizes: Sizes) -> list[int]:
    """Rows of a decode step's batch: every size for which a backend has another kernel."""
    if backend.interpreted:
        return [8, 27] if sizes.C == ALIGNED.C else [27]
    if backend.backend == "simt":
        return [3, 27] if sizes == SMALL else [27]
    return [1, 3, 8, 27]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "sizes", "dtype", "format", "rows"),
    [
        pytest.param(backend, *precision, rows, id=f"{backend}-{name}-{rows}")
        for backend in BACKENDS
        for precision, name in cases(backend)
        for rows in row_counts(backend, precision[0])
    ],
)
def test_a_decode_step_equals_prefill(backend, sizes, dtype, format, rows):
    """A decode step at many cached lengths, `rows` of them in a batch."""
    backbone = Backbone(backend, sizes, dtype, format)
    lengths = lengths_for(backend, sizes)
    if rows == 1:
        lengths = lengths[::4]
    elif backend.backend == "simt" and rows < 8:  # the case of 27 rows has all lengths
        lengths = lengths[:5]
    tokens = max(lengths) + 1
    pages = Pages(backbone, tokens + sum(lengths) + (1 + len(lengths)) * sizes.S)
    whole = pages.sequence(backbone.random_inputs(tokens))
    [hidden] = backbone.prefill([whole], [tokens], pages)
    for first in range(0, len(lengths), rows):
        some = lengths[first : first + rows]
        batch = [pages.copy(whole, length, length + 1) for length in some]
        got = backbone.decode(batch, pages)
        for row, length in enumerate(some):
            where = f"after {length} positions"
            assert_same(got[row], hidden[length], f"hidden state {where}")
            for name in ("k", "v"):
                expected = pages.read(name, whole, length + 1, length)
                assert_same(
                    pages.read(name, batch[row], length + 1, length), expected, f"{name} {where}"
                )


CHUNKS = [[1, 2, 61, 3, 200], [100, 28, 129], [257, 1, 1]]
CHUNKED_CASES = [
    pytest.param(*case.values, chunks, id=f"{case.id}-{chunks}")
    for case in CASES
    # An emulated GPU is slow: one list for it.
    for chunks in CHUNKS[: 1 if case.values[0].backend == "simt" else None]
]


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "sizes", "dtype", "format", "chunks"), CHUNKED_CASES)
def test_prefill_in_chunks_equals_one_prefill(backend, sizes, dtype, format, chunks):
    """In a batch with another sequence, whose chunks are of other sizes."""
    if backend.backend != "native":  # on an emulated GPU, two warps of 32 keys
        chunks = [max(1, chunk // (6 if backend.backend == "simt" else 4)) for chunk in chunks]
    backbone = Backbone(backend, sizes, dtype, format)
    tokens = sum(chunks)
    pages = Pages(backbone, 3 * (tokens + sizes.S))
    whole = pages.sequence(backbone.random_inputs(tokens))
    [hidden] = backbone.prefill([whole], [tokens], pages)
    parts = pages.sequence(whole.inputs)
    other = pages.sequence(backbone.random_inputs(tokens))
    got = torch.cat(
        [
            backbone.prefill([other, parts], [others, chunk], pages)[1]
            for chunk, others in zip(chunks, sorted(chunks), strict=True)
        ]
    )
    assert_same(got, hidden, "hidden states")
    for name in ("k", "v"):
        expected = pages.read(name, whole, tokens)
        assert_same(pages.read(name, parts, tokens), expected, name)


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "sizes", "dtype", "format"), CASES)
def test_token_by_token_equals_prefill(backend, sizes, dtype, format):
    """Every position by a decode step that reads what earlier steps wrote, beside a sequence that
    begins later."""
    backbone = Backbone(backend, sizes, dtype, format)
    tokens = 8 if backend.slow else 300 if backend.backend == "native" else 40
    pages = Pages(backbone, 3 * (tokens + sizes.S))
    whole = pages.sequence(backbone.random_inputs(tokens))
    [hidden] = backbone.prefill([whole], [tokens], pages)
    steps = pages.sequence(whole.inputs)
    other = pages.sequence(backbone.random_inputs(tokens))
    got = torch.cat(
        [backbone.decode([steps, other][: 1 + (t > 3)], pages)[:1] for t in range(tokens)]
    )
    assert_same(got, hidden, "hidden states")
    for name in ("k", "v"):
        expected = pages.read(name, whole, tokens)
        assert_same(pages.read(name, steps, tokens), expected, name)


@pytest.mark.parametrize("sizes", [ALIGNED, WIDE_HEADS], ids=lambda sizes: f"D{sizes.D}")
@pytest.mark.parametrize("backend", [b for b in BACKENDS if b.backend == "simt"], ids=str)
def test_on_tensor_cores_the_paths_agree_within_the_tolerance(backend, sizes):
    """CUDA in bfloat16: the two attentions differ by the rounding of softmax weights."""
    length, width = 130, sizes.D
    k, v = (random_sequences([length], sizes.Hkv, width, torch.bfloat16) for _ in range(2))
    k_pages, v_pages, page_table, seq_lens = paged(k, v, sizes.S)
    q = torch.randn(length, sizes.Hq, width).bfloat16()
    bounds = torch.tensor([0, length], dtype=torch.int32)
    pages, scale = (k_pages, v_pages), width**-0.5
    prefilled = backend.run("prefill_attention", q, *pages, page_table, bounds, seq_lens, scale)
    at = torch.tensor([0, 31, 32, 127, 128, length - 1])
    rows = page_table.expand(len(at), -1).contiguous()
    decoded = backend.run("decode_attention", q[at], *pages, rows, at.int() + 1, scale)
    assert_close(prefilled[at], decoded)
