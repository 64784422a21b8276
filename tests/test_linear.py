import pytest
import torch

from ops_testing import DTYPES, assert_close, opcheck, reference
from voxkern import ops

# (leading shape of x, C, N)
SHAPES = [
    ((1,), 2048, 96),
    ((5,), 1024, 51),
    ((2, 3), 33, 7),
    ((16,), 1, 1),
    ((70,), 130, 19),
    ((300,), 40, 2),
    ((75,), 4133, 23),
    ((0,), 16, 8),
    ((3,), 16, 0),
    ((3,), 0, 4),
    ((), 24, 5),
]


def make(lead, features, rows, dtype):
    """x and a weight that keeps results near 1."""
    weight = torch.randn(rows, features) / max(features, 1) ** 0.5
    return torch.randn(*lead, features).to(dtype), weight.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("lead", "features", "rows"), SHAPES)
def test_linear(target, lead, features, rows, dtype):
    x, weight = make(lead, features, rows, dtype)
    assert_close(target.run("linear", x, weight), reference("linear", x, weight))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_feature_count_up_to_a_few_vectors(target, dtype):
    for features in range(1, 70):
        x, weight = make((2,), features, 5, dtype)
        assert_close(target.run("linear", x, weight), reference("linear", x, weight))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("features", "rows"), [(264, 37), (2048, 130), (8200, 21), (3, 5)])
def test_a_row_does_not_depend_on_the_others(target, features, rows, dtype):
    x, weight = make((67,), features, rows, dtype)
    alone = torch.cat([target.run("linear", row, weight) for row in x.split(1)])
    for batch in (*range(2, 10), 16, 64, 67):
        assert torch.equal(target.run("linear", x[:batch], weight), alone[:batch])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_of_nan_stays_in_its_row(target, dtype):
    x, weight = make((9,), 75, 11, dtype)
    expected = target.run("linear", x, weight)
    x[4] = torch.nan
    got = target.run("linear", x, weight)
    assert got[4].isnan().all()
    others = torch.arange(9) != 4
    assert torch.equal(got[others], expected[others])


def test_strided_rows(target):
    x, weight = make((6,), 96, 10, torch.float32)
    view = x[::2, 16:80]
    weight = weight[:, :64].contiguous()
    assert_close(target.run("linear", view, weight), reference("linear", view, weight))


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.ones(3, 7), r"weight: expected shape \[N, C\] = \[any, 8\], got \[3, 7\]"),
        (torch.ones(8), r"weight: expected 2 dimensions, got shape \[8\]"),
        (torch.ones(3, 8, dtype=torch.bfloat16), "weight: expected float32, got bfloat16"),
        (torch.ones(8, 3).T, "weight: expected a contiguous tensor"),
    ],
)
def test_errors_name_the_tensor(weight, message):
    with pytest.raises(RuntimeError, match=message):
        ops.linear(torch.ones(2, 8), weight)


def test_other_dtypes_are_refused():
    with pytest.raises(RuntimeError, match="x: expected float32 or bfloat16, got float64"):
        ops.linear(torch.ones(2, 8).double(), torch.ones(3, 8).double())


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype):
    opcheck("linear", *make((2, 3), 32, 6, dtype))
