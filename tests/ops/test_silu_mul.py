import pytest
import torch

from ops_testing import DTYPES, assert_close, opcheck, reference
from voxkern import ops

SHAPES = [(1, 16384), (3, 34), (2, 3, 2), (5, 66), (0, 16), (4, 0), (300, 258), (14,)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_silu_mul(target, shape, dtype):
    gate_up = torch.randn(shape).to(dtype) * 3
    assert_close(target.run("silu_mul", gate_up), reference("silu_mul", gate_up))


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_gate(target, dtype):
    """From far below the overflow of exp(-gate) to far above its underflow."""
    gate = torch.cat((torch.linspace(-200, 200, 4001), torch.tensor([-1e30, 1e30, -0.0, 1e-30])))
    gate_up = torch.cat((gate, torch.full_like(gate, 1.5))).to(dtype)
    got = target.run("silu_mul", gate_up)
    exact = torch.nn.functional.silu(gate_up[: len(gate)].double()) * 1.5
    precision = {torch.float32: 1e-6, torch.bfloat16: 2**-8}[dtype]
    torch.testing.assert_close(got.double(), exact, rtol=precision, atol=1e-30)


def test_nan_stays_in_its_place(target):
    gate_up = torch.randn(3, 40)
    gate_up[0, 5] = gate_up[2, 33] = torch.nan
    expected = torch.zeros(3, 20, dtype=torch.bool)
    expected[0, 5] = expected[2, 13] = True
    assert torch.equal(target.run("silu_mul", gate_up).isnan(), expected)


def test_strided_rows(target):
    gate_up = torch.randn(7, 96)[:, 16:80]
    assert_close(target.run("silu_mul", gate_up), reference("silu_mul", gate_up))


@pytest.mark.parametrize(
    ("gate_up", "message"),
    [
        (torch.ones(2, 7), r"gate_up: expected \[..., 2F\], got shape \[2, 7\]"),
        (torch.tensor(1.0), r"gate_up: expected \[..., 2F\], got shape \[\]"),
        (torch.ones(2, 8).half(), "gate_up: expected float32 or bfloat16, got float16"),
    ],
)
def test_errors_name_the_tensor(gate_up, message):
    with pytest.raises(RuntimeError, match=message):
        ops.silu_mul(gate_up)


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype):
    opcheck("silu_mul", torch.randn(2, 3, 34).to(dtype))
