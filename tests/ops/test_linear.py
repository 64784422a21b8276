import pytest
import torch

from op_cases.linear import make
from ops_testing import DTYPES, assert_close, opcheck, reference
from voxkern import ops
from voxkern.quantize import FORMATS, pack, unpack

# (leading shape of x, C, N)
SHAPES = [
    ((1,), 2048, 96),
    ((5,), 1024, 51),
    ((2, 3), 33, 7),
    ((16,), 1, 1),
    ((70,), 130, 19),
    ((300,), 40, 2),
    ((75,), 4133, 23),
    ((5,), 8192, 40),
    ((0,), 16, 8),
    ((3,), 16, 0),
    ((3,), 0, 4),
    ((), 24, 5),
]


# (leading shape of x, C, N) with packed weights.
PACKED_SHAPES = [
    ((1,), 2048, 96),
    ((4,), 1024, 51),
    ((2, 3), 96, 7),
    ((11,), 32, 16),
    ((70,), 160, 33),
    ((1,), 8480, 16),
    ((9,), 2336, 20),
    ((2,), 2400, 200),
    ((16,), 1312, 130),
    ((130,), 32, 3300),
    ((4100,), 64, 20),
    ((0,), 64, 8),
    ((3,), 32, 0),
    ((3,), 0, 4),
    ((), 64, 5),
]


def assert_packed(target, got, expected):
    """The native CPU op has the reference's bits: it adds groups in the same order."""
    if target.device == "cpu" and target.backend == "native":
        assert torch.equal(got, expected)
    else:
        assert_close(got, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("lead", "features", "rows"), SHAPES)
def test_linear(target, lead, features, rows, dtype):
    x, weight = make(lead, features, rows, dtype)
    assert_close(target.run("linear", x, weight), reference("linear", x, weight))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_feature_count_up_to_a_few_vectors(target, dtype):
    for features in range(1, 70, 70 // target.few(70)):
        x, weight = make((2,), features, 5, dtype)
        assert_close(target.run("linear", x, weight), reference("linear", x, weight))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("features", "rows"), [(264, 37), (2048, 130), (8200, 21), (40000, 3), (3, 5)]
)
def test_a_row_does_not_depend_on_the_others(target, features, rows, dtype):
    features = target.at_most(4500, features)
    x, weight = make((target.few(67),), features, rows, dtype)
    alone = torch.cat([target.run("linear", row, weight) for row in x.split(1)])
    for batch in (n for n in (*range(2, 10), 16, 64, 67) if n <= len(x)):
        assert torch.equal(target.run("linear", x[:batch], weight), alone[:batch])


@pytest.mark.parametrize(
    ("batch", "features", "rows"),
    [
        (17, 72, 5633),
        (17, 2048, 19),
        (33, 8200, 37),
        (64, 264, 40),
        (50, 40, 5700),
        (65, 1032, 33),
        (100, 75, 21),
        (129, 520, 130),
        (512, 72, 1425),
        (512, 264, 3),
    ],
)
def test_many_rows_have_the_bits_of_few(target, batch, features, rows):
    """Prompts and large batches, with every kernel and tile size."""
    batch, rows = target.at_most(130, batch), target.at_most(1500, rows)
    x, weight = make((batch,), features, rows, torch.bfloat16)
    together = target.run("linear", x, weight)
    few = torch.cat([target.run("linear", part, weight) for part in x.split(16)])
    assert torch.equal(together, few)
    for row in (0, 16, batch - 1):
        assert torch.equal(together[row], target.run("linear", x[row], weight))
    assert_close(together, reference("linear", x, weight))


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


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("lead", "features", "rows"), PACKED_SHAPES)
def test_packed(target, lead, features, rows, dtype, format):
    lead = [target.at_most(200, rows_of_x) for rows_of_x in lead]
    x, weight = make(lead, features, target.at_most(500, rows), dtype)
    packed = pack(weight, format)
    assert_packed(target, target.run("linear", x, packed), reference("linear", x, packed))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("batch", [1, 2, 8, 9, 16, 17, 64])
def test_packed_batches(target, batch, format):
    for features in (32, 64, 96, 2048, 4160):
        x, weight = make((batch,), features, 32, torch.float32)
        packed = pack(weight, format)
        assert_packed(target, target.run("linear", x, packed), reference("linear", x, packed))


@pytest.mark.parametrize("format", FORMATS)
def test_packed_extremes(target, format):
    """Values at the ends of their ranges, where narrow sums would overflow."""
    for sign in (1, -1):
        x, weight = torch.full((5, 128), 3.0), torch.full((32, 128), -2.0)
        x[:, 32:] *= sign
        weight[1::2] *= sign
        weight[16:, 1::2] *= -1
        x[2:, 1::2] *= -1
        packed = pack(weight, format)
        if format == "int8":
            packed[1, : 16 * 128] = -128
        got = target.run("linear", x, packed)
        assert_packed(target, got, reference("linear", x, packed))
        torch.testing.assert_close(got, x @ unpack(packed).T, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("format", FORMATS)
def test_packed_sizes_of_x(target, format):
    """Each group of x has its own scale, whatever its magnitude; ties round to even."""
    x = torch.randn(9, 160) * torch.tensor([1e-38, 1e-20, 1, 1e20, 1e30]).repeat_interleave(32)
    x[3] = 0
    x[4] = torch.arange(160) % 32 * 0.5 + 48
    x[4, ::32] = 127
    packed = pack(torch.randn(20, 160), format)
    assert_packed(target, target.run("linear", x, packed), reference("linear", x, packed))
    assert (target.run("linear", x, packed)[3] == 0).all()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_is_near_the_plain_product(target, dtype, format):
    x, weight = make((6,), 1024, 64, dtype)
    got = target.run("linear", x, pack(weight, format)).float()
    plain = reference("linear", x, weight).float()
    assert (got - plain).norm() / plain.norm() < {"int8": 0.015, "int4": 0.1}[format]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_rows_do_not_depend_on_the_others(target, dtype, format):
    x, weight = make((target.few(67),), 288, 80, dtype)
    packed = pack(weight, format)
    alone = torch.cat([target.run("linear", row, packed) for row in x.split(1)])
    for batch in (n for n in (*range(2, 10), 16, 64, 67) if n <= len(x)):
        assert torch.equal(target.run("linear", x[:batch], packed), alone[:batch])


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("batch", "features"), [(4100, 544), (12, 2400), (3, 8480)])
def test_packed_rows_alone_in_blocks_of_other_shapes(target, batch, features, format):
    """Many rows and many columns divide the work in different ways."""
    batch = target.at_most(100, batch)
    x, weight = make((batch,), features, 16, torch.float32)
    packed = pack(weight, format)
    together = target.run("linear", x, packed)
    for row in (0, 2, batch // 2 + 1, batch - 1):
        assert torch.equal(target.run("linear", x[row : row + 1], packed), together[row : row + 1])


@pytest.mark.parametrize("format", FORMATS)
def test_packed_with_any_number_of_threads(target, format):
    if target.device != "cpu" or target.backend != "native":
        pytest.skip("only native CPU ops have a team of threads")
    x, weight = make((3,), 1024, 80, torch.float32)
    packed = pack(weight, format)
    before = torch.ops.voxkern.num_threads()
    try:
        for n in (1, 2, 3, 7):
            torch.ops.voxkern.set_num_threads(n)
            assert torch.equal(target.run("linear", x, packed), reference("linear", x, packed))
    finally:
        torch.ops.voxkern.set_num_threads(before)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("format", FORMATS)
def test_packed_row_that_is_not_finite_stays_in_its_row(target, format, bad):
    x, weight = make((9,), 96, 16, torch.float32)
    packed = pack(weight, format)
    expected = target.run("linear", x, packed)
    x[4, 40] = bad
    got = target.run("linear", x, packed)
    assert got[4].isnan().all()
    assert reference("linear", x, packed)[4].isnan().all()
    others = torch.arange(9) != 4
    assert torch.equal(got[others], expected[others])


@pytest.mark.parametrize("format", FORMATS)
def test_packed_from_memory_at_any_address(target, format):
    """A file mapped into memory need not begin on a cache line."""
    x, weight = make((3,), 64, 40, torch.float32)
    packed = pack(weight, format)
    shifted = torch.empty(packed.numel() + 1, dtype=packed.dtype)[1:].view_as(packed)
    shifted.copy_(packed)
    if target.backend == "simt":  # nobody maps files into a GPU's memory
        with pytest.raises(RuntimeError, match=r"weight: packed, expected at .* a multiple of 16"):
            target.run("linear", x, shifted)
    else:
        assert torch.equal(target.run("linear", x, shifted), target.run("linear", x, packed))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_with_x_at_any_address(target, dtype, format):
    x, weight = make((3,), 64, 40, dtype)
    packed = pack(weight, format)
    shifted = torch.cat((x.new_zeros(1), x.flatten()))[1:].view_as(x)
    assert torch.equal(target.run("linear", shifted, packed), target.run("linear", x, packed))


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


@pytest.mark.parametrize(
    ("columns", "weight", "message"),
    [
        (
            64,
            torch.zeros(2, 1 << 10, dtype=torch.int8),
            r"weight: expected shape \[N, C\] packed = \[any, 1088\], got \[2, 1024\]",
        ),
        (
            64,
            torch.zeros(2, 64 * 10, dtype=torch.uint8),
            r"weight: expected shape \[N, C\] packed = \[any, 608\], got \[2, 640\]",
        ),
        (
            64,
            torch.zeros(2, 2, 304, dtype=torch.uint8),
            r"weight: expected 2 dimensions, got shape \[2, 2, 304\]",
        ),
        (
            40,
            torch.zeros(2, 404, dtype=torch.uint8),
            "weight: packed, which needs columns in a multiple of 32, got 40",
        ),
        (
            64,
            torch.zeros(2, 609, dtype=torch.uint8)[:, :608],
            "weight: expected a contiguous tensor",
        ),
    ],
)
def test_errors_of_packed_weights_name_the_tensor(columns, weight, message):
    with pytest.raises(RuntimeError, match=message):
        ops.linear(torch.ones(2, columns), weight)


def test_other_dtypes_are_refused():
    with pytest.raises(RuntimeError, match="x: expected float32 or bfloat16, got float64"):
        ops.linear(torch.ones(2, 8).double(), torch.ones(3, 8).double())


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype):
    opcheck("linear", *make((2, 3), 32, 6, dtype))


@pytest.mark.parametrize("format", FORMATS)
def test_opcheck_of_packed_weights(format):
    x, weight = make((2, 3), 32, 6, torch.float32)
    opcheck("linear", x, pack(weight, format))
