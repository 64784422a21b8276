import pytest
import torch

from ops_testing import DTYPES, assert_close, opcheck, reference
from voxkern import ops

SHAPES = [(1, 2048), (3, 1024), (2, 3, 33), (5, 1), (0, 16), (130, 264)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm(target, shape, dtype):
    x = torch.randn(shape, dtype=dtype)
    weight = torch.randn(shape[-1], dtype=dtype)
    assert_close(target.run("rms_norm", x, weight, 1e-5), reference("rms_norm", x, weight, 1e-5))


def test_strided_rows(target):
    x = torch.randn(7, 96)[:, 16:80]
    weight = torch.randn(64)
    assert_close(target.run("rms_norm", x, weight, 1e-5), reference("rms_norm", x, weight, 1e-5))


@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_eps_counts_on_a_tiny_row(target, eps):
    x = torch.full((2, 40), 1e-4)
    weight = torch.ones(40)
    assert_close(target.run("rms_norm", x, weight, eps), reference("rms_norm", x, weight, eps))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_add_rms_norm(target, shape, dtype):
    x, residual = torch.randn(2, *shape, dtype=dtype)
    weight = torch.randn(shape[-1], dtype=dtype)
    expected_residual = residual.clone()
    expected = reference("add_rms_norm", x, expected_residual, weight, 1e-5)
    got = target.run("add_rms_norm", x, residual, weight, 1e-5)
    assert_close(got, expected)
    assert torch.equal(residual, expected_residual)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.ones(7), r"weight: expected shape \[C\] = \[8\], got \[7\]"),
        (torch.ones(8, dtype=torch.bfloat16), "weight: expected float32, got bfloat16"),
        (torch.ones(16)[::2], "weight: expected a contiguous tensor"),
        (torch.ones(8, device="meta"), "weight: on meta, the op's first tensor on cpu"),
        (None, "weight: expected a tensor, got None"),
    ],
)
def test_errors_name_the_tensor(weight, message):
    with pytest.raises(RuntimeError, match=message):
        ops.rms_norm(torch.ones(2, 8), weight, 1e-5)


def test_meta_tensors_have_shapes():
    got = ops.rms_norm(torch.ones(2, 8, device="meta"), torch.ones(8, device="meta"), 1e-5)
    assert got.shape == (2, 8)
    assert got.device.type == "meta"


def test_opcheck():
    x = torch.randn(3, 32)
    opcheck("rms_norm", x, torch.randn(32), 1e-5)
    opcheck("add_rms_norm", x, torch.randn(3, 32), torch.randn(32), 1e-5)
