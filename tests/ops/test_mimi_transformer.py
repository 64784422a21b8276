import pytest
import torch
from torch import Tensor

from op_cases.mimi_transformer import SIZES, Sizes, make
from ops_testing import assert_close, opcheck, reference
from voxkern.quantize import pack

MATRICES = ("qkv", "o", "up", "down")


PACKED_SIZES = Sizes(T=4, C=96, L=2, F=160, Hq=4, Hkv=2, D=24, W=9)
POSITIONS = [[0], [3, 0, 700]]


def run(call, arguments: dict) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the output and the updated keys and values."""
    arguments = arguments | {name: arguments[name].clone() for name in ("keys", "values")}
    out = call("mimi_transformer", *arguments.values())
    return out, arguments["keys"], arguments["values"]


def written(arguments: dict, ring: Tensor) -> tuple:
    """Index of the new steps of a ring: `ring[...]` is `[B, T, L, Hkv, D]`."""
    steps = arguments["positions"][:, None] + torch.arange(arguments["x"].shape[1])
    return torch.arange(len(steps))[:, None], slice(None), slice(None), steps % ring.shape[3]


def takes_packed(target) -> bool:
    """True if the target accepts packed matrices, which kernels for GPUs do not."""
    return str(target) == "native-cpu"


def check(target, arguments: dict, near=assert_close) -> None:
    got, expected = run(target.run, arguments), run(reference, arguments)
    assert not expected[0].isnan().any()
    near(got[0], expected[0])
    new = written(arguments, arguments["keys"])
    for name, mine, theirs in zip(("keys", "values"), got[1:], expected[1:], strict=True):
        near(mine[new], theirs[new])
        before = arguments[name].clone()
        before[new] = mine[new]
        torch.testing.assert_close(mine, before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("room", [0, 5])
@pytest.mark.parametrize("positions", POSITIONS, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_mimi_transformer(target, sizes, positions, room):
    def near(got, expected):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)

    check(target, make(sizes, positions, room), near)


@pytest.mark.parametrize("positions", POSITIONS, ids=str)
@pytest.mark.parametrize("formats", [("bf16",) * 4, ("int8",) * 4, ("int4", "", "int8", "bf16")])
def test_other_weights(target, formats, positions):
    """A value that rounds the other way changes all later ones."""

    def near(got, expected):
        assert (got - expected).norm() <= 0.01 * expected.norm()

    arguments = make(PACKED_SIZES, positions)
    for name, format in zip(MATRICES, formats, strict=True):
        if format == "bf16":
            arguments[name] = arguments[name].bfloat16()
        elif format:
            arguments[name] = pack(arguments[name], format)
    if set(formats) - {"bf16", ""} and not takes_packed(target):
        with pytest.raises(RuntimeError, match="qkv: packed"):
            run(target.run, arguments)
        return
    check(target, arguments, near)


def test_a_stream_of_days(target):
    """At such positions the rotary angles are large, and must equal torch's."""
    arguments = make(SIZES[0], [25 * 86_400 * 3 + 1, 40_000_000])
    check(target, arguments, lambda got, expected: assert_close(got, expected))


def larger(ring: Tensor, position: int) -> Tensor:
    """A stream's ring before the step at `position`, with three more slots."""
    capacity = ring.shape[3]
    steps = torch.arange(max(0, position - capacity), position)
    grown = torch.full((*ring.shape[:3], capacity + 3, ring.shape[4]), torch.nan)
    grown[:, :, :, steps % (capacity + 3)] = ring[:, :, :, steps % capacity]
    return grown


@pytest.mark.parametrize("format", ["", "bf16", "int8"])
@pytest.mark.parametrize("sizes", [SIZES[0], *SIZES[3:6], PACKED_SIZES], ids=str)
def test_pieces_are_the_whole_bit_for_bit(target, sizes, format):
    """For any division of a stream, any ring size, and any other streams in the batch."""
    if format == "int8" and not takes_packed(target):
        pytest.skip("a GPU's kernels take no packed matrices here")
    positions = [3, 0, 700]
    arguments = make(sizes, positions)
    for name in MATRICES:
        if format == "bf16":
            arguments[name] = arguments[name].bfloat16()
        elif format and arguments[name].shape[-1] % 32 == 0:
            arguments[name] = pack(arguments[name], format)
    whole = run(target.run, arguments)
    for b in [2] if target.interpreted else range(3):
        one = {n: larger(arguments[n][b : b + 1], positions[b]) for n in ("keys", "values")}
        at, parts = 0, []
        for size in (1, 2, sizes.T):
            size = min(size, sizes.T - at)
            piece = (
                arguments
                | one
                | {
                    "x": arguments["x"][b : b + 1, at : at + size],
                    "positions": torch.tensor([positions[b] + at]),
                }
            )
            out, one["keys"], one["values"] = run(target.run, piece)
            parts.append(out)
            at += size
        assert torch.equal(torch.cat(parts, 1), whole[0][b : b + 1])
        alone = {n: arguments[n][b : b + 1] for n in ("x", "positions")}
        for ring, name in zip(whole[1:], ("keys", "values"), strict=True):
            mine, ring = one[name], ring[b : b + 1]
            assert torch.equal(mine[written(alone, mine)], ring[written(alone, ring)])


def test_any_number_of_threads(target):
    if target.device != "cpu" or target.backend != "native":
        pytest.skip("only native CPU ops have a team of threads")
    cases = [make(sizes, [3, 0]) for sizes in SIZES[:4]]
    expected = [run(target.run, arguments)[0] for arguments in cases]
    before = torch.ops.voxkern.num_threads()
    try:
        for n in (1, 2, 3, 7):
            torch.ops.voxkern.set_num_threads(n)
            for arguments, out in zip(cases, expected, strict=True):
                assert torch.equal(run(target.run, arguments)[0], out)
    finally:
        torch.ops.voxkern.set_num_threads(before)


@pytest.mark.parametrize("streams", [0, 2])
def test_nothing_to_do(target, streams):
    sizes = Sizes(T=0 if streams else 3, C=8, L=1, F=4, Hq=1, Hkv=1, D=2, W=3)
    out, _, _ = run(target.run, make(sizes, [4] * streams))
    assert out.shape == (streams, sizes.T, 8)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"x": torch.ones(2, 3)}, "x: expected 3 dimensions"),
        ({"x": torch.ones(1, 2, 64).bfloat16()}, "x: expected float32, got bfloat16"),
        ({"positions": torch.zeros(1).int()}, "positions: expected int64, got int32"),
        ({"norms": torch.ones(2, 3, 64)}, r"norms: expected shape \[L, 4, C\] = \[2, 4, 64\]"),
        ({"qkv": torch.ones(2, 190, 64)}, r"qkv: expected shape .* = \[2, 192, 64\]"),
        ({"qkv_bias": torch.ones(2, 190)}, "qkv_bias: expected .* Hq a multiple of Hkv"),
        ({"o_bias": torch.ones(2, 63)}, r"o_bias: expected shape \[L, C\] = \[2, 64\]"),
        ({"up": torch.ones(2, 95, 64)}, r"up: expected shape .* = \[2, 96, 64\]"),
        ({"down": torch.ones(2, 64, 96).double()}, "down: expected float32, got float64"),
        ({"activation": "elu"}, "activation: expected gelu, gelu_tanh, relu or silu, got elu"),
        ({"keys": torch.ones(1, 2, 4, 8, 14)}, r"keys: expected shape .* = \[1, 2, 4, 8, 16\]"),
        ({"keys": torch.ones(2, 1, 4, 8, 16)}, r"keys: expected shape .* = \[1, 2, 4, 8, 16\]"),
        ({"keys": torch.ones(1, 2, 4, 7, 16)}, r"keys: .* capacity >= window - 1 \+ T = 8, got"),
        ({"window": 8}, r"keys: .* capacity >= window - 1 \+ T = 9, got \[1, 2, 4, 8, 16\]"),
        ({"values": torch.ones(1, 2, 4, 9, 16)}, r"values: expected shape .* \[1, 2, 4, 8, 16\]"),
        ({"window": 0}, "window: expected 1 or more, got 0"),
    ],
)
def test_errors_name_the_argument(target, wrong, message):
    arguments = make(SIZES[0], [3]) | wrong
    with pytest.raises(RuntimeError, match=message):
        target.run("mimi_transformer", *arguments.values())


def test_a_position_below_0_is_refused_on_the_cpu():
    arguments = make(SIZES[0], [3]) | {"positions": torch.tensor([-1])}
    with pytest.raises(RuntimeError, match="positions: stream 0 is at -1"):
        torch.ops.voxkern.mimi_transformer(*arguments.values())


def test_opcheck():
    arguments = make(SIZES[0], [3, 0])
    rings = {name: arguments[name].nan_to_num(0.0) for name in ("keys", "values")}
    opcheck("mimi_transformer", *(arguments | rings).values())  # it compares bits, and NaN differs
