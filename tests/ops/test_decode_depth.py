from dataclasses import replace

import pytest
import torch
from torch import Tensor

from op_cases.decode_depth import (
    MATRICES,
    PACKED_PERSISTENT_SIZES,
    PACKED_SIZES,
    PACKINGS,
    PERSISTENT_SIZES,
    SIZES,
    Sizes,
    make,
    packed,
)
from ops_testing import DTYPES, opcheck, reference
from voxkern import ops
from voxkern.persistent import PERSISTENT_DEPTH
from voxkern.quantize import FORMATS, unpack

# The packings that the server offers.
SERVED_PACKINGS = [
    dict.fromkeys(("qkv", "o", "gate_up", "down"), format) | {"heads": "int8"} for format in FORMATS
]


@pytest.fixture(autouse=True)
def _one_torch_thread():
    """The reference runs thousands of tiny torch ops, and waking threads for each would be slow."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def shortened(target, sizes: Sizes, codebooks: int = 4, layers: int = 1) -> Sizes:
    """Caps codebooks on slow targets, and layers too in Triton's interpreter."""
    if target.interpreted:
        return replace(sizes, K=min(sizes.K, codebooks), L=min(sizes.L, layers))
    return replace(sizes, K=min(sizes.K, 2 * codebooks)) if target.slow else sizes


def select_rows(arguments: dict, rows: slice) -> dict:
    """The arguments of a call with only these rows."""
    row_arguments = ("hidden", "code0", "temperature", "top_k", "top_p", "min_p", "seeds", "frames")
    return arguments | {name: arguments[name][rows] for name in row_arguments}


def run(target, arguments: dict) -> Tensor:
    return target.run("decode_depth", *arguments.values())


def run_persistent(target, arguments: dict) -> Tensor:
    """Runs the private op that makes a whole frame with one kernel."""
    return target.run(PERSISTENT_DEPTH, *arguments.values())


@pytest.fixture
def _has_persistent_kernel(target):
    if reason := target.why_missing(PERSISTENT_DEPTH):
        pytest.skip(reason)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_codes_are_the_references(target, sizes, rows):
    if target.interpreted:
        sizes = shortened(target, sizes, layers=3)
    for _ in range(1 if target.slow else 3):
        arguments = make(sizes, torch.float32, rows)
        got = run(target, arguments)
        assert torch.equal(got, reference("decode_depth", *arguments.values()))
        assert torch.equal(got[:, 0], arguments["code0"])


@pytest.mark.parametrize("packing", [{}, *PACKINGS], ids=str)
@pytest.mark.parametrize("private", [False, True], ids=["op", "persistent"])
def test_rows_that_are_not_finite_draw_no_codes(target, packing, private, request):
    """A hidden state with NaN or infinity, and a row without codebook 0, disturb no other row."""
    draw = run
    if private:
        request.getfixturevalue("_has_persistent_kernel")
        draw = run_persistent
    sizes = shortened(target, PACKED_SIZES[0] if packing else SIZES[0], codebooks=3)
    dtype = torch.bfloat16 if private else torch.float32
    arguments = packed(make(sizes, dtype, 6), packing)
    expected = draw(target, arguments)
    assert expected.min() >= 0
    hidden, code0 = arguments["hidden"].clone(), arguments["code0"].clone()
    hidden[0, -1] = float("nan")
    hidden[2, 0] = float("inf")
    hidden[5] = float("nan")
    code0[3] = -1
    codes = draw(target, arguments | {"hidden": hidden, "code0": code0})
    kept = torch.tensor([1, 4])
    assert torch.equal(codes[kept], expected[kept])
    assert (codes[[0, 2, 5], 1:] == -1).all()
    assert codes[3, 0] == -1


def test_every_position_is_attended_to(target):
    """Many codes and a strong attention make the weight of every key matter."""
    sizes = Sizes(K=32, V=601, L=1, Cb=40, C=40, F=8, Hq=4, Hkv=2, D=16)
    sizes = shortened(target, sizes, codebooks=12 if target.interpreted else sizes.K)
    arguments = make(sizes, torch.float32, target.few(24))
    arguments["temperature"].zero_()
    arguments["o"] *= 6
    got = run(target, arguments)
    assert torch.equal(got, reference("decode_depth", *arguments.values()))


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("sizes", [SIZES[0], SIZES[5], SIZES[6]], ids=str)
def test_bfloat16_codes_are_nearly_always_the_references(target, sizes, temperature):
    """A code that changes by rounding changes all later ones of its frame.

    So codes count only up to the first difference in a frame. By chance, 1 in 35 would agree.
    """
    sizes = shortened(target, sizes)
    assert agreement(target, lambda: make(sizes, torch.bfloat16, 8), temperature) > 0.97


def agreement(target, make_arguments, temperature: float, rounds: int = 4) -> float:
    """Share of codes equal to the reference's, counted up to each frame's first difference."""
    same = total = 0
    for _ in range(target.few(rounds) or 1):
        arguments = make_arguments()
        arguments["temperature"].fill_(temperature)
        got = run(target, arguments)
        expected = reference("decode_depth", *arguments.values())
        agreed = (got == expected).long().cumprod(1).sum(1)
        same += int((agreed - 1).sum())
        total += int((agreed - 1).sum() + (agreed < got.shape[1]).sum())
    return same / total


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("packing", PACKINGS, ids=str)
@pytest.mark.parametrize("sizes", PACKED_SIZES, ids=str)
def test_codes_of_packed_weights_are_nearly_always_the_references(target, sizes, packing, dtype):
    """An activation that rounds to another int8 value may change a code."""
    sizes = shortened(target, sizes)
    share = agreement(target, lambda: packed(make(sizes, dtype, 8), packing), 0.0, rounds=1)
    assert share > (0.98 if dtype == torch.float32 else 0.95)


@pytest.mark.parametrize("format", FORMATS)
def test_packed_codes_are_those_of_the_packed_values(target, format):
    """A plain matrix holds the same weights, so only the rounding of x differs."""
    same = total = 0
    sizes = shortened(target, PACKED_SIZES[0])
    for _ in range(target.few(3) or 1):
        arguments = packed(make(sizes, torch.float32, 8), dict.fromkeys(MATRICES, format))
        arguments["temperature"].fill_(0)
        rows = {"projection": 96, "qkv": 128, "o": 96, "gate_up": 320, "down": 96, "heads": 41}
        plain = {n: unpack(arguments[n])[..., : rows[n], :].contiguous() for n in MATRICES}
        agreed = (run(target, arguments) == run(target, arguments | plain)).long().cumprod(1).sum(1)
        same += int((agreed - 1).sum())
        total += int((agreed - 1).sum() + (agreed < sizes.K).sum())
    assert same / total > 0.9


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_number_of_rows_gives_each_row_its_codes(target, dtype):
    """Up to 16 rows use launches that do more work, some of them 8 rows at a time."""
    sizes = Sizes(K=3, V=35, L=1, Cb=40, C=264, F=72, Hq=4, Hkv=2, D=64)
    arguments = make(sizes, dtype, 17)
    expected = run(target, arguments)
    for rows in (1, 16) if target.interpreted else (1, 8, 9, 16):
        assert torch.equal(run(target, select_rows(arguments, slice(0, rows))), expected[:rows])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("packing", [{}, *PACKINGS[:2]], ids=str)
def test_a_row_does_not_depend_on_the_others(target, packing, dtype):
    sizes = shortened(target, PACKED_SIZES[0] if packing else SIZES[0], codebooks=3)
    arguments = packed(make(sizes, dtype, 8), packing)
    batch = run(target, arguments)
    for b in range(0, 8, 8 // target.few(8)):
        alone = run(target, select_rows(arguments, slice(b, b + 1)))
        assert torch.equal(alone[0], batch[b])
    assert torch.equal(run(target, select_rows(arguments, slice(2, 7))), batch[2:7])


@pytest.mark.usefixtures("_has_persistent_kernel")
def test_a_persistent_kernel_leaves_no_code_out(target):
    """The vocabulary has more codes than the threads of a block cover in one pass."""
    sizes = Sizes(K=2, V=3500, L=1, Cb=8, C=8, F=8, Hq=1, Hkv=1, D=64)
    arguments = make(sizes, torch.bfloat16, 1) | {"temperature": torch.zeros(1)}
    arguments["audio_rows"].zero_()
    arguments["heads"].zero_()
    arguments["heads"][0, -1] = 1
    arguments["heads"][0, -2] = -1
    got = run_persistent(target, arguments)
    assert got[0, 1] in (3498, 3499)


@pytest.mark.usefixtures("_has_persistent_kernel")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("packing", [{}, *SERVED_PACKINGS, PACKINGS[2]], ids=str)
@pytest.mark.parametrize("which", [0, 1], ids=["heads of 64", "heads of 128"])
def test_a_persistent_kernel_gives_the_same_codes(target, monkeypatch, which, packing, dtype):
    sizes = (PACKED_PERSISTENT_SIZES if packing else PERSISTENT_SIZES)[which]
    arguments = packed(make(sizes, dtype, 8), packing)
    expected = run(target, arguments)
    assert expected.min() >= 0
    for rows in (1, 3, 8):
        row_arguments = select_rows(arguments, slice(0, rows))
        assert torch.equal(run_persistent(target, row_arguments), expected[:rows])
    if target.backend == "simt":
        # Some blocks have no GEMM tile; others have several rows between the GEMMs.
        monkeypatch.setenv("VOXKERN_SIMT_MULTIPROCESSORS", "9")
        for rows in (1, 5):
            row_arguments = select_rows(arguments, slice(0, rows))
            assert torch.equal(run_persistent(target, row_arguments), expected[:rows])


def test_seed_and_frame_decide_the_draw(target):
    arguments = make(shortened(target, SIZES[0]), torch.float32, 1)
    arguments["temperature"].fill_(1.0)
    first = run(target, arguments)
    assert torch.equal(run(target, arguments), first)
    for name in ("seeds", "frames"):
        assert not torch.equal(run(target, arguments | {name: arguments[name] + 1}), first)


def test_no_rows(target):
    arguments = make(SIZES[0], torch.float32, 3)
    assert run(target, select_rows(arguments, slice(0, 0))).shape == (0, SIZES[0].K)


@pytest.mark.parametrize("packing", [{}, *PACKINGS], ids=str)
def test_any_number_of_threads(target, packing):
    if target.device != "cpu" or target.backend != "native":
        pytest.skip("only native CPU ops have a team of threads")
    sizes = PACKED_SIZES[0] if packing else SIZES[0]
    arguments = packed(make(sizes, torch.float32, 5), packing)
    before = torch.ops.voxkern.num_threads()
    try:
        codes = []
        for n in (1, 2, 3, 7):
            torch.ops.voxkern.set_num_threads(n)
            codes.append(run(target, arguments))
    finally:
        torch.ops.voxkern.set_num_threads(before)
    assert all(torch.equal(c, codes[0]) for c in codes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"code0": torch.tensor([0, 35, 1])}, "code0: expected codes of -1 to 34, got 35 in row 1"),
        ({"code0": torch.tensor([0, 1, -2])}, "code0: expected codes of -1 to 34, got -2 in row 2"),
        ({"code0": torch.zeros(2).long()}, r"code0: expected shape \[B\] = \[3\], got \[2\]"),
        ({"norm": torch.ones(39)}, r"norm: expected shape \[C\] = \[40\], got \[39\]"),
        (
            {"norm": torch.ones(40, dtype=torch.bfloat16)},
            "norm: expected float32, got bfloat16",
        ),
        ({"rope_table": torch.ones(31, 16)}, "rope_table: expected .* K = 32, got"),
        ({"num_heads": 3}, "num_heads: expected a multiple of num_kv_heads, got 3 and 2"),
        ({"num_heads": 6}, r"qkv: expected shape \[L, \(Hq \+ 2 Hkv\) D, C\] = \[2, 160, 40\]"),
        ({"seeds": torch.zeros(3)}, "seeds: expected int64, got float32"),
        ({"heads": torch.ones(0, 35, 40)}, r"heads: expected \[K - 1, V, C\] with K >= 2"),
        ({"heads": torch.ones(31, 34, 40)}, r"heads: expected shape .* = \[31, 35, 40\], got"),
        ({"projection": torch.ones(40, 47)}, r"projection: expected shape .* = \[40, 48\], got"),
        ({"audio_rows": torch.ones(1121, 40)}, r"audio_rows: .* K = 32, got \[1121, 40\]"),
        ({"audio_rows": torch.ones(1120)}, r"audio_rows: expected 2 dimensions, got"),
        (
            {"audio_rows": torch.ones(1120, 40).double()},
            "audio_rows: expected float32, got",
        ),
    ],
)
def test_errors_name_the_tensor(change, message):
    arguments = make(SIZES[0], torch.float32) | change
    with pytest.raises(RuntimeError, match=message):
        ops.decode_depth(**arguments)


@pytest.mark.parametrize(
    ("name", "weight", "message"),
    [
        (
            "heads",
            torch.zeros(31, 2, 880),
            r"heads: .* packed = \[31, 3, 880\], got \[31, 2,",
        ),
        ("heads", torch.zeros(3, 880), "heads: expected 3 dimensions"),
        (
            "projection",
            torch.zeros(5, 608),
            r"projection: .* packed = \[6, 608\], got \[5, 608",
        ),
    ],
)
def test_errors_of_packed_weights_name_the_tensor(name, weight, message):
    arguments = make(PACKED_SIZES[0], torch.float32) | {name: weight.to(torch.uint8)}
    with pytest.raises(RuntimeError, match=message):
        ops.decode_depth(**arguments)


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype):
    arguments = make(SIZES[2], dtype).values()
    opcheck("decode_depth", *arguments)
    opcheck(PERSISTENT_DEPTH, *arguments)


@pytest.mark.parametrize("format", FORMATS)
def test_opcheck_of_packed_weights(format):
    arguments = packed(make(PACKED_SIZES[1], torch.float32), dict.fromkeys(MATRICES, format))
    opcheck("decode_depth", *arguments.values())
