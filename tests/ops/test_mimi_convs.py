"""A chain of convolutions, compared with single ones, and invalid plans."""

import pytest
import torch

from op_cases.mimi_convs import make
from ops_testing import DTYPES, assert_close, opcheck, reference
from voxkern.quantize import block_rows


def run(call, arguments: dict) -> list[torch.Tensor]:
    """Returns the output and the updated past of each convolution."""
    arguments = arguments | {"past": [past.clone() for past in arguments["past"]]}
    return [call("mimi_convs", *arguments.values()), *arguments["past"]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "blocks"), [(1, 1), (3, 7), (2, 40), (0, 4)])
def test_mimi_convs(target, batch, blocks, dtype):
    arguments = make(batch, blocks, dtype)
    got, expected = run(target.run, arguments), run(reference, arguments)
    assert got[0].shape == (batch, 5 * blocks, 1)
    for mine, theirs in zip(got, expected, strict=True):
        if dtype == torch.float32:
            assert_close(mine, theirs)
        else:  # a value that rounds the other way changes later ones
            assert (mine - theirs).norm() <= 0.01 * theirs.norm()


def test_pieces_are_the_whole_bit_for_bit(target):
    arguments = make(3, 12)
    whole = run(target.run, arguments)
    for b in range(3):
        row = slice(b, b + 1)
        past, fresh, at, parts = [p[row] for p in arguments["past"]], arguments["fresh"][row], 0, []
        for blocks in (1, 4, 7):
            x = arguments["x"][row, 2 * at : 2 * (at + blocks)]
            piece = arguments | {"x": x, "fresh": fresh, "past": past}
            out, *past = run(target.run, piece)
            fresh = torch.zeros(1, dtype=torch.bool)
            parts.append(out)
            at += blocks
        assert torch.equal(torch.cat(parts, 1), whole[0][row])
        for mine, theirs in zip(past, whole[1:], strict=True):
            assert torch.equal(mine, theirs[row])


def test_a_stream_that_begins_repeats_its_first_sample(target):
    """Blocks of two samples, and more convolutions than one launch can store the past of."""
    count, width = 50, 8
    plan = [number for i in range(count) for number in (i, -1, 1, 0, 2, 2, i % 2)]
    arguments = {
        "x": torch.randn(3, 4, width),
        "fresh": torch.tensor([True, False, True]),
        "past": [torch.randn(3, 1, 2 * width) for _ in range(count)],
        "weights": [block_rows(torch.randn(16, 32) / 6) for _ in range(count)],
        "biases": [torch.randn(16) for _ in range(count)],
        "plan": plan,
    }
    got, expected = run(target.run, arguments), run(reference, arguments)
    for mine, theirs in zip(got, expected, strict=True):
        assert_close(mine, theirs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a["plan"].pop(), "plan: expected 35 entries, as there are 5 weights, got 34"),
        (lambda a: a["past"].pop(), "past: expected 5 entries"),
        (lambda a: a["biases"].pop(), "biases: expected 5 entries"),
        (lambda a: a["plan"].__setitem__(0, 1), "plan: convolution 0 reads an output that does"),
        (lambda a: a["plan"].__setitem__(8, 2), "plan: convolution 1 reads an output that does"),
        (lambda a: a["plan"].__setitem__(0, -1), "plan: convolution 0 reads an output that does"),
        (lambda a: a["plan"].__setitem__(4, 0), "plan: expected blocks of 1 or more"),
        (lambda a: a["plan"].__setitem__(4, 3), "x: expected whole blocks of 3"),
        (lambda a: a["plan"].__setitem__(26, 7), "biases: expected whole blocks of 7"),
        (lambda a: a.update(x=a["x"].bfloat16()), "x: expected float32, got bfloat16"),
        (lambda a: a.update(fresh=torch.ones(3)), "fresh: expected bool, got float32"),
        (lambda a: a["past"].__setitem__(0, torch.ones(2, 2, 6)), "past: expected shape"),
    ],
)
def test_errors_name_the_argument(target, change, message):
    arguments = make(2, 4)
    change(arguments)
    with pytest.raises(RuntimeError, match=message):
        target.run("mimi_convs", *arguments.values())


def test_opcheck():
    opcheck("mimi_convs", *make(2, 3).values())
