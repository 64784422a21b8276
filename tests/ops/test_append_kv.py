import pytest
import torch

from op_cases.append_kv import case
from ops_testing import DTYPES, TOLERANCE, assert_close, opcheck, reference
from voxkern import ops


def copy(args: tuple) -> tuple:
    return tuple(arg.clone() for arg in args)


SHAPES = [
    # T, Hq, Hkv, D, S
    (1, 32, 8, 64, 16),
    (40, 8, 2, 128, 17),
    (5, 3, 3, 2, 1),
    (33, 8, 1, 80, 16),
    (7, 6, 2, 34, 5),
    (0, 4, 2, 16, 16),
    (300, 4, 4, 16, 64),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_append_kv(target, shape, dtype):
    tokens, *sizes = shape
    args = case(target.few(tokens) if tokens > 9 else tokens, *sizes, dtype)
    args[5][1::4] = -1
    q, k, v, *_, k_pages, v_pages = args
    original_k, original_v = k.clone(), v.clone()
    expected = copy(args)
    reference("append_kv", *expected)
    target.run("append_kv", *args)
    assert_close(q, expected[0])
    assert torch.equal(k, original_k)
    assert torch.equal(v, original_v)
    # Slots that no token names still hold NaN.
    torch.testing.assert_close(k_pages, expected[6], equal_nan=True, **TOLERANCE[dtype])
    assert torch.equal(v_pages.nan_to_num(7e7), expected[7].nan_to_num(7e7))


def test_rotates_as_transformers_does(target):
    """Llama's rotary embedding, float32, up to the rounding of one multiplication."""
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    args = case(target.few(64), 8, 2, 64, 16)
    q, k, _, table, positions, slots, k_pages, _ = args
    cos, sin = (torch.cat((half, half), -1)[None] for half in table[positions].chunk(2, -1))
    q_expected, k_expected = llama.apply_rotary_pos_emb(
        q.clone().transpose(0, 1)[None], k.transpose(0, 1)[None], cos, sin
    )
    target.run("append_kv", *args)
    exact = {"rtol": 2**-22, "atol": 2**-22}
    torch.testing.assert_close(q, q_expected[0].transpose(0, 1), **exact)
    written = k_pages[slots // 16, :, slots % 16]
    torch.testing.assert_close(written, k_expected[0].transpose(0, 1), **exact)


def test_position_zero_changes_nothing(target):
    args = case(9, 4, 2, 16, 16)
    q, k, _, _, positions, slots, k_pages, _ = args
    positions.zero_()
    before = q.clone()
    target.run("append_kv", *args)
    assert torch.equal(q, before)
    assert torch.equal(k_pages[slots // 16, :, slots % 16], k)


def test_no_slot_writes_nothing(target):
    args = case(9, 4, 2, 16, 16)
    args[5].fill_(-1)
    target.run("append_kv", *args)
    assert args[6].isnan().all()
    assert args[7].isnan().all()


@pytest.mark.parametrize(
    ("index", "change", "message"),
    [
        (4, (3, 50), "positions: expected 0 to 49.* got 50 at index 3"),
        (4, (0, -1), "positions: expected 0 to 49.* got -1 at index 0"),
        (5, (2, 48), "slots: expected less than 48.* got 48 at index 2"),
    ],
)
def test_a_place_outside_is_named(index, change, message):
    args = case(16, 4, 2, 16, 16, max_positions=50)
    before = copy(args)
    args[index][change[0]] = change[1]
    with pytest.raises(RuntimeError, match=message):
        ops.append_kv(*args)
    assert torch.equal(args[0], before[0])
    assert args[6].isnan().all()


@pytest.mark.parametrize(
    ("index", "change", "message"),
    [
        (0, lambda q: q[:, :, :15], "q: expected the last two dimensions to be contiguous"),
        (0, lambda q: q[:, :, :15].contiguous(), "q: expected an even head width"),
        (0, lambda q: q.double(), "q: expected float32 or bfloat16, got float64"),
        (0, lambda q: q[:1].expand(9, -1, -1), "q: expected tokens that do not overlap"),
        (
            1,
            lambda k: k[:, :1],
            r"k: expected shape \[T, Hkv, D\] = \[9, 2, 16\], got \[9, 1, 16\]",
        ),
        (2, lambda v: v.transpose(1, 2).contiguous().transpose(1, 2), "v: expected the last two"),
        (3, lambda table: table[:, :8].contiguous(), r"rope_table: .* = \[any, 16\]"),
        (4, lambda positions: positions.int(), "positions: expected int64, got int32"),
        (5, lambda slots: slots[:3], r"slots: expected shape \[T\] = \[9\]"),
        (7, lambda pages: pages.bfloat16(), "v_pages: expected float32, got bfloat16"),
        (7, lambda pages: pages[1:], "v_pages: expected k_pages' shape"),
    ],
)
def test_errors_name_the_tensor(index, change, message):
    args = list(case(9, 4, 2, 16, 16))
    args[index] = change(args[index])
    with pytest.raises(RuntimeError, match=message):
        ops.append_kv(*args)


def test_opcheck():
    q, k, v, *rest = case(5, 4, 2, 16, 16)
    opcheck("append_kv", q.contiguous(), k.contiguous(), v.contiguous(), *rest)
