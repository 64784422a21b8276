import hashlib

import pytest
import torch

from voxkern import quantize
from voxkern.quantize import FORMATS, LAYOUT_VERSION, integers, pack, packed_shape, unpack

SHAPES = [(16, 32), (1, 32), (17, 64), (3, 33, 96), (2, 1, 5, 32), (40, 2048)]


def relative_error(got, expected):
    return ((got - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_unpacked_is_near_the_weight(format, shape, dtype):
    weight = torch.randn(shape).to(dtype)
    packed = pack(weight, format)
    assert tuple(packed.shape) == packed_shape(shape, format)
    assert packed.is_contiguous()
    assert quantize.format_of(packed) == format
    rows = shape[-2]
    assert quantize.num_rows(packed) == -(-rows // 16) * 16
    restored = unpack(packed)
    assert restored.shape == (*shape[:-2], quantize.num_rows(packed), shape[-1])
    assert (restored[..., rows:, :] == 0).all()
    restored, weight = restored[..., :rows, :], weight.float()
    if format == "int8":
        step = weight.abs().amax(-1, keepdim=True) / 127
        assert ((restored - weight).abs() <= step * 0.501).all()
    assert relative_error(restored, weight) < {"int8": 0.01, "int4": 0.09}[format]


def plainly_rounded(groups):
    """int4 with float32 scales that make the value of largest magnitude -8."""
    extreme = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    return (groups / (extreme / -8)).round().clamp(-8, 7) * (extreme / -8)


@pytest.mark.parametrize("degrees", [None, 3.0], ids=["normal", "heavy-tailed"])
def test_int4_is_nearer_than_with_plain_rounding(degrees):
    shape = (64, 8, 32)
    groups = torch.randn(shape)
    if degrees:
        groups = torch.distributions.StudentT(degrees).sample(shape)
    restored = unpack(pack(groups.flatten(1), "int4")).view_as(groups)
    error, plain = ((v - groups).square().sum(-1) for v in (restored, plainly_rounded(groups)))
    assert error.sum() < 0.97 * plain.sum()
    # If the best scale is not representable, a single group may have a larger error.
    assert (error <= plain * 1.5).all()


def test_an_int4_row_may_have_groups_of_any_size():
    """Groups far smaller than the largest one only keep the precision that the row needs."""
    groups = torch.randn(32, 8, 32) * torch.logspace(0, -6, 8)[:, None]
    restored = unpack(pack(groups.flatten(1), "int4")).view_as(groups)
    error = (restored - groups).norm(dim=-1)
    norms = groups.norm(dim=-1)
    assert (error[:, :3] < 0.15 * norms[:, :3]).all()
    assert (error < 0.01 * norms[:, :1])[:, 3:].all()


@pytest.mark.parametrize("format", FORMATS)
def test_representable_values_are_kept(format):
    """Any integers with any scale of the format, if each group or row has the largest integer."""
    if format == "int8":
        values = torch.randint(-127, 128, (48, 96)).float()
        values[:, 5] = -127
        weight = values * torch.rand(48, 1)
    else:
        values = torch.randint(-8, 8, (48, 3, 32)).float()
        values[:, :, 7] = -8
        scales = (torch.randint(16, 32, (48, 3, 1)) / 16) * 2.0 ** torch.randint(-6, 1, (48, 3, 1))
        signs = torch.randint(0, 2, (48, 3, 1)) * 2 - 1
        scales[:, 0] = 1
        weight = (values * scales * signs * 2.0 ** torch.randint(-20, 20, (48, 1, 1))).flatten(1)
    restored = unpack(pack(weight, format))
    torch.testing.assert_close(restored, weight, rtol=1e-6, atol=0)
    assert torch.equal(integers(pack(weight, format))[0].abs(), values.flatten(1).abs())


def float32_at(packed, block, at):
    return packed[block, at : at + 4].clone().view(torch.float32)


def test_layout_of_int8():
    packed = pack(torch.randn(37, 96), "int8")
    values, group_scales, row_scales = integers(packed)
    assert (group_scales == 1).all()
    for row, column in ((0, 0), (15, 95), (16, 1), (36, 50), (40, 3)):
        block, r = divmod(row, 16)
        assert packed[block, column // 4 * 64 + 4 * r + column % 4] == values[row, column]
        assert float32_at(packed, block, 16 * 96 + 4 * r) == row_scales[row, 0]


def test_layout_of_int4():
    packed = pack(torch.randn(37, 96), "int4")
    values, group_scales, row_scales = integers(packed)
    assert group_scales.sign().unique().tolist() == [-1, 1]
    for row, column in ((0, 0), (15, 95), (16, 1), (36, 50), (30, 76), (40, 3)):
        (block, r), (group, c) = divmod(row, 16), divmod(column, 32)
        byte = int(packed[block, group * 256 + c // 8 * 64 + 4 * r + c % 4])
        assert (byte >> 4 if c % 8 >= 4 else byte & 15) - 8 == values[row, column]
        code = int(packed[block, 8 * 96 + 16 * group + r])
        magnitude = 2.0 ** ((code >> 4 & 7) - 7) * (1 + (code & 15) / 16)
        assert (-magnitude if code >> 7 else magnitude) == group_scales[row, group]
        assert float32_at(packed, block, 8 * 96 + 48 + 4 * r) == row_scales[row, 0]


@pytest.mark.parametrize("format", FORMATS)
def test_the_size_of_values_costs_no_precision(format):
    weight = torch.randn(16, 64)
    expected = unpack(pack(weight, format))
    for size in (2.0**-80, 2.0**120):
        torch.testing.assert_close(unpack(pack(weight * size, format)), expected * size)


@pytest.mark.parametrize("format", FORMATS)
def test_zeros_and_nothing(format):
    weight = torch.randn(20, 64)
    weight[3] = 0
    weight[5, 32:] = 0
    restored = unpack(pack(weight, format))
    assert (restored[3] == 0).all()
    assert (restored[5, 32:] == 0).all()
    for shape in ((0, 32), (4, 0), (0, 3, 32)):
        packed = pack(torch.zeros(shape), format)
        assert unpack(packed).shape == (*shape[:-2], -(-shape[-2] // 16) * 16, shape[-1])


@pytest.mark.parametrize("format", FORMATS)
def test_chunks_do_not_show(format, monkeypatch):
    weight = torch.randn(2, 75, 64)
    whole = pack(weight, format)
    monkeypatch.setattr(quantize, "_CHUNK", 32 * 64)
    assert torch.equal(pack(weight, format), whole)
    assert torch.equal(torch.stack([pack(w, format) for w in weight]), whole)
    assert torch.equal(pack(weight.mT.contiguous().mT, format), whole)


@pytest.mark.parametrize("format", FORMATS)
def test_values_too_small_to_be_divided_by_are_zero(format):
    assert (unpack(pack(torch.full((1, 32), 1e-42), format)) == 0).all()
    tiny = torch.zeros(1, 64)
    tiny[:, 32:] = 1e-36
    assert (unpack(pack(tiny, format))[0] != 0).tolist() == [False] * 32 + [True] * 32


@pytest.mark.parametrize(
    ("weight", "format", "message"),
    [
        (torch.ones(4, 33), "int4", "weight: expected columns in a multiple of 32, got 33"),
        (torch.ones(4, 32), "int3", "format must be int8 or int4, got int3"),
        (torch.full((4, 32), torch.nan), "int8", "weight: a value is not finite"),
        (torch.full((4, 32), torch.inf), "int4", "weight: a value is not finite"),
        (torch.full((4, 32), torch.nan), "int4", "weight: a value is not finite"),
    ],
)
def test_errors(weight, format, message):
    with pytest.raises(ValueError, match=message):
        pack(weight, format)


def test_packed_bytes_change_only_with_the_layout_version():
    """If this fails, increase LAYOUT_VERSION and update the digests."""
    # Multiples of 1/64, so that no sum depends on its order.
    weight = (torch.arange(40 * 64) * 37 % 101 - 50).float().div(64).view(40, 64)
    digests = {f: hashlib.sha256(pack(weight, f).numpy()).hexdigest()[:16] for f in FORMATS}
    assert (LAYOUT_VERSION, digests) == (
        2,
        {"int8": "f8a57aab2a5b451a", "int4": "b516230e0decebcb"},
    )


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("format", FORMATS)
def test_threads_pack_the_same(format, inference):
    weight = torch.randn(3, 40, 16384)  # several parts of each matrix
    expected = pack(weight, format)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with torch.inference_mode(inference):
            assert torch.equal(pack(weight, format), expected)
            weight[2, 39, 5] = torch.nan
            with pytest.raises(ValueError, match="not finite"):
                pack(weight, format)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
