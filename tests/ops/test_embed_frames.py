import pytest
import torch

from op_cases.embed_frames import case
from ops_testing import DTYPES, assert_close, opcheck, reference
from voxkern import ops

SHAPES = [
    # T, K, V, text vocabulary, C
    (1, 32, 2051, 300, 2048),
    (70, 32, 51, 300, 264),
    (3, 1, 5, 1, 1),
    (9, 5, 17, 40, 33),
    (2, 3, 7, 11, 257),
    (2, 300, 5, 9, 520),
    (0, 4, 9, 9, 16),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_embed_frames(target, shape, dtype):
    tokens, *sizes = shape
    args = case(target.few(tokens) if tokens > 9 else tokens, *sizes, dtype)
    assert_close(target.run("embed_frames", *args), reference("embed_frames", *args))


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_in_the_order_of_the_columns(target, dtype):
    """Bit for bit: float32 sums one after the other, rounded at the end."""
    frames, mask, audio_table, text_table = case(6, 7, 11, 13, 40, dtype)
    audio_table *= 10.0 ** torch.arange(-3, 4).repeat_interleave(11)[:, None]
    got = target.run("embed_frames", frames, mask, audio_table, text_table)
    for t in range(6):
        total = torch.zeros(40)
        for column in range(8):
            if mask[t, column]:
                code = int(frames[t, column])
                row = audio_table[11 * column + code] if column < 7 else text_table[code]
                total += row.float()
        assert torch.equal(got[t], total.to(dtype))


def test_text_and_audio_frames(target):
    """A text token uses the last column, an audio frame the other columns, a blank row none."""
    frames, mask, audio_table, text_table = case(3, 4, 9, 12, 24)
    frames[:] = torch.tensor([8, 0, 5, 8, 11])
    mask[0] = torch.tensor([False] * 4 + [True])
    mask[1] = ~mask[0]
    mask[2] = False
    got = target.run("embed_frames", frames, mask, audio_table, text_table)
    assert torch.equal(got[0], text_table[11])
    assert_close(got[1], audio_table[8] + audio_table[9] + audio_table[18 + 5] + audio_table[35])
    assert (got[2] == 0).all()


def test_strided_frames(target):
    frames, mask, *tables = case(8, 4, 9, 12, 24)
    args = frames[::2], mask[::2], *tables
    assert not args[0].is_contiguous()
    assert_close(target.run("embed_frames", *args), reference("embed_frames", *args))


@pytest.mark.parametrize(
    ("row", "column", "code", "message"),
    [
        (2, 3, 9, r"frames: expected 0 to 8, .* got 9 at index \[2, 3\]"),
        (0, 0, -1, r"frames: expected 0 to 8, .* got -1 at index \[0, 0\]"),
        (1, 4, 12, r"frames: expected 0 to 11, .* got 12 at index \[1, 4\]"),
    ],
)
def test_an_id_outside_is_named(row, column, code, message):
    frames, mask, *tables = case(3, 4, 9, 12, 24)
    frames[row, column] = code
    mask[row, column] = False
    ops.embed_frames(frames, mask, *tables)
    mask[row, column] = True
    with pytest.raises(RuntimeError, match=message):
        ops.embed_frames(frames, mask, *tables)
    with pytest.raises(RuntimeError, match="frames: an id"):
        reference("embed_frames", frames, mask, *tables)


@pytest.mark.parametrize(
    ("index", "change", "message"),
    [
        (0, lambda frames: frames.int(), "frames: expected int64, got int32"),
        (0, lambda frames: frames[:, :1], r"frames: expected shape \[T, K \+ 1\] with K >= 1"),
        (1, lambda mask: mask[:2], r"mask: expected shape \[T, K \+ 1\] = \[3, 5\], got \[2, 5\]"),
        (1, lambda mask: mask.int(), "mask: expected bool, got int32"),
        (2, lambda table: table[:35], r"audio_table: expected \[K \* V, C\] with K = 4"),
        (2, lambda table: table.half(), "audio_table: expected float32 or bfloat16, got float16"),
        (
            3,
            lambda table: table[:, :9].contiguous(),
            r"text_table: .* = \[any, 24\], got \[12, 9\]",
        ),
        (3, lambda table: table.bfloat16(), "text_table: expected float32, got bfloat16"),
    ],
)
def test_errors_name_the_tensor(index, change, message):
    args = list(case(3, 4, 9, 12, 24))
    args[index] = change(args[index])
    with pytest.raises(RuntimeError, match=message):
        ops.embed_frames(*args)


def test_opcheck():
    opcheck("embed_frames", *case(3, 4, 9, 12, 24))
