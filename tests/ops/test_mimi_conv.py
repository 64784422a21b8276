from dataclasses import replace

import pytest
import torch

from op_cases.mimi_conv import SIZES, Sizes, make
from ops_testing import DTYPES, assert_close, opcheck, reference
from voxkern.quantize import block_rows, unblock_rows


def run(call, arguments) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the output and the updated past."""
    arguments = arguments | {"past": arguments["past"].clone()}
    return call("mimi_conv", *arguments.values()), arguments["past"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("add", "elu"), [(True, False), (False, True)])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_mimi_conv(target, sizes, add, elu, dtype):
    arguments = make(sizes, dtype, add, elu)
    out, past = run(target.run, arguments)
    expected, expected_past = run(reference, arguments)
    if target.device == "cuda" and elu and dtype == torch.bfloat16:
        # The GPU's exp differs from the CPU's in the last bit, so an ELU may round the other way.
        assert (out - expected).norm() <= 0.01 * expected.norm()
    else:
        assert_close(out, expected)
    assert torch.equal(past, expected_past)


def test_it_is_torchs_convolution(target):
    s = Sizes(B=2, T=20, C=6, J=3, N=10, dilation=4)
    weight, bias, x = torch.randn(s.N, s.C, s.J), torch.randn(s.N), torch.randn(s.B, s.T, s.C)
    taps = block_rows(weight.transpose(1, 2).flatten(1))
    silence = torch.zeros(s.B, (s.J - 1) * s.dilation, s.C)
    out = target.run("mimi_conv", x, silence, taps, bias, None, s.dilation, False)
    padded = torch.nn.functional.pad(x.transpose(1, 2), ((s.J - 1) * s.dilation, 0))
    expected = torch.nn.functional.conv1d(padded, weight, bias, dilation=s.dilation)
    torch.testing.assert_close(out, expected.transpose(1, 2), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [SIZES[1], SIZES[2], SIZES[6], SIZES[7]], ids=str)
def test_pieces_are_the_whole_bit_for_bit(target, sizes, dtype):
    """For any division of a stream, and with any other streams in the batch."""
    arguments = make(sizes, dtype)
    whole, last = run(target.run, arguments)
    for b in range(sizes.B):
        past, at, parts = arguments["past"][b : b + 1], 0, []
        for size in (1, 2, 0, 30, sizes.T):
            rows = {n: arguments[n][b : b + 1, at : at + size] for n in ("x", "add")}
            part, past = run(target.run, arguments | rows | {"past": past})
            parts.append(part)
            at += size
        assert torch.equal(torch.cat(parts, 1), whole[b : b + 1])
        assert torch.equal(past, last[b : b + 1])


@pytest.mark.parametrize(
    "sizes",
    [Sizes(B=3, T=1450, C=16, J=1, N=64), Sizes(B=1, T=8300, C=128, J=2, N=128)],
    ids=str,
)
def test_many_rows_are_few_bit_for_bit(target, sizes):
    """For every tiling of the rows of many streams."""
    sizes = replace(sizes, T=max(target.few(sizes.T), 1000))
    # Without ELU: among so many values, its result would round the other way for some.
    arguments = make(sizes, torch.bfloat16, elu=False)
    whole, _ = run(target.run, arguments)
    expected, _ = run(reference, arguments)
    assert_close(whole, expected)
    for at in (0, sizes.T - 3):
        before = torch.cat((arguments["past"], arguments["x"]), 1)[:, at : at + sizes.J - 1]
        rows = {n: arguments[n][:, at : at + 3] for n in ("x", "add")}
        few, _ = run(target.run, arguments | rows | {"past": before.contiguous()})
        assert torch.equal(few, whole[:, at : at + 3])


def test_any_number_of_threads(target):
    if target.device != "cpu" or target.backend != "native":
        pytest.skip("only native CPU ops have a team of threads")
    cases = [make(sizes) for sizes in SIZES[:4]]
    expected = [run(target.run, arguments)[0] for arguments in cases]
    before = torch.ops.voxkern.num_threads()
    try:
        for n in (1, 2, 3, 7):
            torch.ops.voxkern.set_num_threads(n)
            for arguments, out in zip(cases, expected, strict=True):
                assert torch.equal(run(target.run, arguments)[0], out)
    finally:
        torch.ops.voxkern.set_num_threads(before)


def test_strided_inputs(target):
    arguments = make(SIZES[2])
    view = {n: torch.cat([arguments[n]] * 2, 2)[..., : arguments[n].shape[2]] for n in ("x", "add")}
    assert torch.equal(run(target.run, arguments | view)[0], run(target.run, arguments)[0])


def test_nan_stays_in_its_stream_and_its_future(target):
    arguments = make(Sizes(B=3, T=12, C=16, J=3, N=20))
    expected, _ = run(target.run, arguments)
    x = arguments["x"].clone()
    x[1, 5, 3] = torch.nan
    out, _ = run(target.run, arguments | {"x": x})
    assert out[1, 5:8].isnan().all()
    touched = torch.zeros(3, 12, dtype=torch.bool)
    touched[1, 5:8] = True
    assert torch.equal(out[~touched], expected[~touched])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [0, 1, 16, 21])
def test_blocks_hold_the_rows(dtype, rows):
    weight = torch.randn(rows, 6).to(dtype)
    blocks = unblock_rows(block_rows(weight))
    assert len(blocks) == -(-rows // 16) * 16
    assert torch.equal(blocks[:rows], weight)
    assert not blocks[rows:].any()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"x": torch.ones(2, 8)}, r"x: expected 3 dimensions, got shape \[2, 8\]"),
        ({"x": torch.ones(2, 3, 8).double()}, "x: expected float32, got float64"),
        ({"past": torch.ones(2, 1, 8)}, r"past: expected shape .* = \[2, 2, 8\], got \[2, 1, 8\]"),
        ({"past": torch.ones(2, 8, 2).mT}, "past: expected a contiguous tensor"),
        ({"weight": torch.ones(1, 20, 16)}, "weight: expected columns in a multiple of C = 8"),
        ({"weight": torch.ones(1, 0, 16)}, "weight: expected columns in a multiple of C = 8"),
        ({"weight": torch.ones(2, 24, 16)}, r"weight: expected shape .* = \[1, 24, 16\]"),
        ({"weight": torch.ones(5, 24)}, "weight: expected 3 dimensions"),
        (
            {"weight": torch.ones(1, 12, 16, 3, dtype=torch.bfloat16)},
            r"weight: expected shape .* = \[1, 12, 16, 2\]",
        ),
        ({"weight": torch.ones(1, 24, 16).int()}, "weight: expected float32 or bfloat16"),
        ({"bias": torch.ones(5).bfloat16()}, "bias: expected float32, got bfloat16"),
        ({"add": torch.ones(2, 3, 4)}, r"add: expected shape .* = \[2, 3, 5\], got \[2, 3, 4\]"),
        ({"dilation": 0}, "dilation: expected 1 or more, got 0"),
    ],
)
def test_errors_name_the_argument(target, wrong, message):
    arguments = make(Sizes(B=2, T=3, C=8, J=3, N=5)) | wrong
    with pytest.raises(RuntimeError, match=message):
        target.run("mimi_conv", *arguments.values())


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype):
    opcheck("mimi_conv", *make(Sizes(B=2, T=3, C=8, J=3, N=5), dtype).values())
