from dataclasses import replace

import pytest
import torch
from torch import Tensor

from op_cases.decode_backbone import PACKED_SIZES, PACKINGS, SIZES, Sizes, make, packed
from ops_testing import DTYPES, assert_close, opcheck, reference
from voxkern import ops
from voxkern.quantize import pack

LENGTHS = [[1], [40], [1, 700, 16, 257, 2]]
"""Keys of each sequence, the new one included."""


def run(call, arguments: dict) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the hidden states and the updated pages."""
    arguments = arguments | {n: arguments[n].clone() for n in ("k_pages", "v_pages")}
    hidden = call("decode_backbone", *arguments.values())
    return hidden, arguments["k_pages"], arguments["v_pages"]


def select_rows(arguments: dict, rows: slice) -> dict:
    """The arguments of a call with only these rows."""
    row_arguments = ("x", "positions", "slots", "page_table", "seq_lens")
    return arguments | {name: arguments[name][rows] for name in row_arguments}


def composed(
    run_op,
    x: Tensor,
    attn_norm: Tensor,
    qkv: Tensor,
    o: Tensor,
    mlp_norm: Tensor,
    gate_up: Tensor,
    down: Tensor,
    norm: Tensor,
    rope_table: Tensor,
    num_heads: int,
    num_kv_heads: int,
    eps: float,
    positions: Tensor,
    slots: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
) -> Tensor:
    """decode_backbone as a sequence of other ops, each run by `run_op(name, ...)`."""
    head_dim, width = rope_table.shape[1], len(norm)
    heads_width = (num_heads + 2 * num_kv_heads) * head_dim
    residual = x.clone()
    x = run_op("rms_norm", x, attn_norm[0] if len(attn_norm) else norm, eps)
    for i, next_norm in enumerate([*attn_norm, norm][1:]):
        heads = run_op("linear", x, qkv[i])[:, :heads_width].unflatten(1, (-1, head_dim))
        q, k, v = heads.split((num_heads, num_kv_heads, num_kv_heads), 1)
        run_op("append_kv", q, k, v, rope_table, positions, slots, k_pages[i], v_pages[i])
        x = run_op(
            "decode_attention", q, k_pages[i], v_pages[i], page_table, seq_lens, head_dim**-0.5
        )
        x = run_op("linear", x.flatten(1), o[i])[:, :width]
        x = run_op("add_rms_norm", x, residual, mlp_norm[i], eps)
        x = run_op("linear", run_op("silu_mul", run_op("linear", x, gate_up[i])), down[i])
        x = run_op("add_rms_norm", x[:, :width].contiguous(), residual, next_norm, eps)
    return x


def assert_same_bits(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for ours, theirs in zip(got, expected, strict=True):
        assert torch.equal(ours.nan_to_num(1234.5), theirs.nan_to_num(1234.5))


def native_cpu(target) -> None:
    if target.device != "cpu" or target.backend != "native":
        pytest.skip("a promise of the native CPU op")


def shortened(target, sizes: Sizes) -> Sizes:
    """At most two layers on slow targets."""
    return replace(sizes, L=min(sizes.L, 2)) if target.slow else sizes


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_float32_is_the_reference(target, sizes, lengths):
    arguments = make(shortened(target, sizes), torch.float32, lengths)
    for got, expected in zip(run(target.run, arguments), run(reference, arguments), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_bfloat16_is_no_farther_from_float32_than_twice_the_reference(target, sizes, lengths):
    arguments = make(shortened(target, sizes), torch.bfloat16, lengths)
    wide = {
        n: a.float() if isinstance(a, Tensor) and a.dtype == torch.bfloat16 else a
        for n, a in arguments.items()
    }
    exact = run(reference, wide)
    for got, theirs, true in zip(
        run(target.run, arguments), run(reference, arguments), exact, strict=True
    ):
        assert torch.equal(got.isnan(), true.isnan())
        error, allowed = ((t.float() - true).nan_to_num().norm() for t in (got, theirs))
        assert error <= 2 * allowed + 1e-3 * true.nan_to_num().norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_bits_are_those_of_the_composed_ops(target, sizes, lengths, dtype):
    arguments = make(shortened(target, sizes), dtype, lengths)
    expected = run(lambda _, *args: composed(target.run, *args), arguments)
    assert_same_bits(run(target.run, arguments), expected)


def layers_of(target, rows: int) -> int:
    """Two layers, or one on slow targets but for some numbers of rows."""
    return 1 if target.interpreted or (target.slow and rows not in (3, 17)) else 2


# More queries per key than a block handles, and numbers of rows around the limits of a launch.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 8, 9, 16, 17])
def test_bits_of_many_rows_are_those_of_the_composed_ops(target, rows, dtype):
    layers, width = layers_of(target, rows), 64 if dtype == torch.bfloat16 else 32
    heads = target.at_most(6, 10)
    sizes = Sizes(L=layers, C=264, F=136, Hq=heads, Hkv=2, D=width, S=16)
    arguments = make(sizes, dtype, [*([3, 129, 260, 1, 128] * 4)[:rows]])
    expected = run(lambda _, *args: composed(target.run, *args), arguments)
    assert_same_bits(run(target.run, arguments), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("packing", PACKINGS, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS[1:], ids=str)
@pytest.mark.parametrize("sizes", PACKED_SIZES, ids=str)
def test_bits_of_packed_weights_are_those_of_the_composed_ops(
    target, sizes, lengths, packing, dtype
):
    arguments = packed(make(sizes, dtype, lengths), packing)
    expected = run(lambda _, *args: composed(target.run, *args), arguments)
    assert_same_bits(run(target.run, arguments), expected)


# Rows of several ranges, the last one partial, and several tiles per block.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("packing", PACKINGS[:2], ids=str)
@pytest.mark.parametrize("rows", [1, 3, 8, 9, 16, 17])
def test_bits_of_many_packed_rows_are_those_of_the_composed_ops(target, rows, packing, dtype):
    layers, ffn = layers_of(target, rows), target.at_most(96, 544)
    heads = target.at_most(6, 10)
    sizes = Sizes(L=layers, C=target.at_most(160, 288), F=ffn, Hq=heads, Hkv=2, D=32, S=16)
    arguments = packed(make(sizes, dtype, [*([3, 20, 1, 16] * 5)[:rows]]), packing)
    together = run(target.run, arguments)
    assert_same_bits(together, run(lambda _, *args: composed(target.run, *args), arguments))
    alone, _, _ = run(target.run, select_rows(arguments, slice(rows - 1, rows)))
    assert torch.equal(alone[0], together[0][-1])


@pytest.mark.parametrize("packing", PACKINGS, ids=str)
@pytest.mark.parametrize("sizes", PACKED_SIZES, ids=str)
def test_packed_is_near_the_reference(target, sizes, packing):
    """An activation that rounds the other way changes all later values slightly."""
    arguments = packed(make(sizes, torch.float32, LENGTHS[2]), packing)
    got, expected = run(target.run, arguments)[0], run(reference, arguments)[0]
    assert (got - expected).norm() < 0.01 * expected.norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("sizes", "packing"),
    [*((s, {}) for s in SIZES[:2]), *((PACKED_SIZES[0], p) for p in PACKINGS[1:3])],
    ids=str,
)
def test_any_number_of_threads(target, sizes, packing, dtype):
    """Numbers of threads that divide the key/value heads evenly, and others."""
    native_cpu(target)
    arguments = packed(make(sizes, dtype, LENGTHS[2]), packing)
    before = torch.ops.voxkern.num_threads()
    try:
        results = []
        for n in (1, 2, 3, 4, 7):
            torch.ops.voxkern.set_num_threads(n)
            results.append(run(target.run, arguments))
    finally:
        torch.ops.voxkern.set_num_threads(before)
    for result in results[1:]:
        assert_same_bits(result, results[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("packing", [{}, *PACKINGS[:2]], ids=str)
def test_a_row_does_not_depend_on_the_others(target, packing, dtype):
    sizes = PACKED_SIZES[0] if packing else SIZES[0]
    arguments = packed(make(sizes, dtype, [3, 300, 17, 1, 64, 5]), packing)
    together, _, _ = run(target.run, arguments)
    for b in (1,) if target.interpreted else range(6):
        alone, _, _ = run(target.run, select_rows(arguments, slice(b, b + 1)))
        assert torch.equal(alone[0], together[b])
    assert torch.equal(run(target.run, select_rows(arguments, slice(1, 4)))[0], together[1:4])


def test_token_by_token_is_the_whole_sequence(target):
    """Each step reads the keys and values that earlier steps have written."""
    arguments = make(SIZES[1], torch.float32, [12])
    arguments["k_pages"].fill_(torch.nan)
    arguments["v_pages"].fill_(torch.nan)
    expected = {n: a.clone() if isinstance(a, Tensor) else a for n, a in arguments.items()}
    page_table, page_size = arguments["page_table"], SIZES[1].S
    for t in range(target.at_most(7, 12)):
        step = {
            "x": torch.randn(1, SIZES[1].C),
            "positions": torch.tensor([t]),
            "slots": page_table[:, t // page_size].long() * page_size + t % page_size,
            "seq_lens": torch.tensor([t + 1], dtype=torch.int32),
        }
        got = target.run("decode_backbone", *(arguments | step).values())
        want = reference("decode_backbone", *(expected | step).values())
        assert_close(got, want)


def test_a_negative_slot_is_not_written_and_an_empty_sequence_attends_to_nothing(target):
    arguments = make(SIZES[0], torch.float32, [40, 20, 9])
    arguments["slots"][1] = -1
    arguments["seq_lens"][1:] = torch.tensor([19, 0])
    arguments["slots"][2] = -7
    hidden, k_pages, v_pages = run(target.run, arguments)
    assert_close(hidden, run(reference, arguments)[0])
    changed = (k_pages.isnan() != arguments["k_pages"].isnan()).nonzero()
    assert set((changed[:, 1] * SIZES[0].S + changed[:, 3]).tolist()) == {
        int(arguments["slots"][0])
    }
    assert torch.equal(v_pages.isnan(), k_pages.isnan())


def test_no_rows(target):
    arguments = make(SIZES[0], torch.float32, [4, 2])
    hidden, k_pages, _ = run(target.run, select_rows(arguments, slice(0, 0)))
    assert hidden.shape == (0, SIZES[0].C)
    assert torch.equal(k_pages.isnan(), arguments["k_pages"].isnan())


def test_a_view_of_wider_rows(target):
    arguments = make(SIZES[0], torch.float32, [7, 30])
    wider = torch.cat((arguments["x"], torch.full((2, 3), torch.nan)), 1)
    hidden, _, _ = run(target.run, arguments | {"x": wider[:, :-3]})
    assert torch.equal(hidden, run(target.run, arguments)[0])


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("x", lambda x: x[0], r"x: expected 2 dimensions, got shape \[40\]"),
        ("x", lambda x: x.half(), "x: expected float32 or bfloat16, got float16"),
        ("x", lambda x: x[:, :39], r"attn_norm: expected shape \[L, C\] = \[2, 39\]"),
        ("qkv", lambda w: w.bfloat16(), "qkv: expected float32, got bfloat16"),
        ("down", lambda w: w[:1], r"down: expected shape \[L, C, F\] = \[2, 40, 72\]"),
        ("num_heads", lambda _: 3, "num_heads: expected a multiple of num_kv_heads"),
        ("rope_table", lambda t: t[:5], "positions: expected 0 to 4, .* got 19 at index 0"),
        ("positions", lambda p: p.int(), "positions: expected int64, got int32"),
        ("positions", lambda p: p - 9, "positions: expected 0 to 22, .* got -1 at index 1"),
        ("slots", lambda s: s[:1], r"slots: expected shape \[B\] = \[2\], got \[1\]"),
        ("slots", lambda s: s * 0 + 96, "slots: expected less than 96, .* got 96 at index 0"),
        ("k_pages", lambda k: k[0], r"k_pages: expected shape \[L, P, Hkv, S, D\]"),
        ("k_pages", lambda k: k[..., :0, :], "k_pages: expected a page size S >= 1"),
        ("k_pages", lambda k: k.transpose(0, 1), "k_pages: expected a contiguous tensor"),
        ("v_pages", lambda v: v[:, 1:].contiguous(), "v_pages: expected k_pages' shape"),
        ("page_table", lambda t: t.long(), "page_table: expected int32, got int64"),
        ("seq_lens", lambda n: n * 0 + 49, "seq_lens: expected 0 to 48, .* got 49 at index 0"),
        ("seq_lens", lambda n: n + 16, "page_table: expected 0 to 5, .* got 2147483647 at index"),
    ],
)
def test_errors_name_the_tensor(name, change, message):
    arguments = make(SIZES[0], torch.float32, [20, 9])
    arguments[name] = change(arguments[name])
    with pytest.raises(RuntimeError, match=message):
        ops.decode_backbone(**arguments)


@pytest.mark.parametrize(
    ("sizes", "name", "format", "message"),
    [
        (SIZES[0], "qkv", "int4", r"qkv: packed, which needs columns in a multiple of 32, got 40"),
        (SIZES[0], "gate_up", "int8", "gate_up: packed, which needs F in a multiple of 16, got 72"),
        (
            PACKED_SIZES[0],
            "o",
            "int4",
            r"o: expected shape \[L, C, Hq D\] packed = \[2, 6, 608\]",
        ),
        (PACKED_SIZES[0], "down", "int8", r"gate_up: expected shape \[L, 2F, C\] = \[2, 384, 96\]"),
    ],
)
def test_errors_of_packed_weights_name_the_tensor(sizes, name, format, message):
    arguments = make(sizes, torch.float32, [20, 9])
    shape = arguments[name].shape
    wrong = torch.zeros(*shape[:-1], -(-shape[-1] // 32) * 32 + 32 * (sizes in PACKED_SIZES))
    arguments[name] = pack(wrong, format)
    with pytest.raises(RuntimeError, match=message):
        ops.decode_backbone(**arguments)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("packing", [{}, *PACKINGS[:2]], ids=str)
def test_opcheck(packing, dtype):
    sizes = PACKED_SIZES[0] if packing else SIZES[0]
    arguments = packed(make(sizes, dtype, [20, 9]), packing)
    for name in ("k_pages", "v_pages"):
        arguments[name] = arguments[name].nan_to_num()
    opcheck("decode_backbone", *arguments.values())
