import pytest
import torch

from kv_testing import paged, random_sequences, strided_heads
from op_cases.decode_attention import case
from ops_testing import DTYPES, assert_close, opcheck, reference
from voxkern import ops

SHAPES = [
    # lengths, Hq, Hkv, D, S
    ([1], 32, 8, 64, 16),
    ([2048], 8, 2, 64, 16),
    ([5, 64, 65, 0, 200, 256, 257], 8, 2, 128, 16),
    ([33, 700], 3, 3, 80, 17),
    ([70, 3], 6, 3, 2, 1),
    ([100, 0, 31], 6, 2, 16, 16),
    ([513], 5, 1, 34, 64),
    ([20, 90], 8, 1, 16, 300),
    ([77], 7, 1, 33, 16),
    ([0, 0], 4, 4, 16, 16),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_decode_attention(target, shape, dtype):
    args = case(*shape, dtype)
    assert_close(target.run("decode_attention", *args), reference("decode_attention", *args))


def test_equals_scaled_dot_product_attention(target):
    q, k_pages, v_pages, page_table, seq_lens, scale = case([150], 8, 2, 64, 16)
    used = page_table[0, :10].long()
    k, v = (
        pages[used].transpose(1, 2).flatten(0, 1)[:150].transpose(0, 1)
        for pages in (k_pages, v_pages)
    )
    expected = torch.nn.functional.scaled_dot_product_attention(
        q[0, :, None][None], k[None], v[None], scale=scale, enable_gqa=True
    )
    got = target.run("decode_attention", q, k_pages, v_pages, page_table, seq_lens, scale)
    assert_close(got[0], expected[0, :, 0])


def test_large_scores_do_not_overflow(target):
    """Needs the running maximum: without it, e^1000 would be infinite."""
    k = torch.zeros(130, 1, 16)
    k[:, 0, 0] = torch.linspace(-1000, 1000, 130)
    v = torch.randn(130, 1, 16)
    q = torch.zeros(1, 1, 16)
    q[0, 0, 0] = 1.0
    for order in (torch.arange(130), torch.arange(129, -1, -1)):
        args = (q, *paged([k[order]], [v[order]], 16), 1.0)
        got = target.run("decode_attention", *args)
        assert_close(got, reference("decode_attention", *args))
        assert_close(got[0, 0], v[129, 0])


def test_an_empty_sequence_gives_zeros(target):
    args = case([0, 9, 0], 4, 2, 16, 16)
    got = target.run("decode_attention", *args)
    assert (got[[0, 2]] == 0).all()
    assert (got[1] != 0).any()


def test_no_sequences(target):
    q, k_pages, v_pages, page_table, seq_lens, scale = case([4], 4, 2, 16, 16)
    got = target.run(
        "decode_attention", q[:0], k_pages, v_pages, page_table[:0], seq_lens[:0], scale
    )
    assert got.shape == (0, 4, 16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_the_batch_or_the_pages(target, dtype):
    lengths = [300, 17, 1000, 1, 64]
    k, v = (random_sequences(lengths, 2, 64, dtype) for _ in range(2))
    q = strided_heads(len(lengths), 8, 64, dtype)
    together = target.run("decode_attention", q, *paged(k, v, 16), 0.125)
    for page_size in (16, 1, 17, 1024):
        for b in range(len(lengths)):
            alone = target.run(
                "decode_attention",
                q[b : b + 1],
                *paged(k[b : b + 1], v[b : b + 1], page_size),
                0.125,
            )
            assert torch.equal(alone[0], together[b])


def test_bits_do_not_depend_on_the_threads():
    args = case([2000, 30], 8, 2, 64, 16)
    before = torch.ops.voxkern.num_threads()
    results = []
    for threads in (1, 2, 5):
        torch.ops.voxkern.set_num_threads(threads)
        results.append(ops.decode_attention(*args))
    torch.ops.voxkern.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize(
    ("index", "change", "message"),
    [
        (0, lambda q: q[:, :3], "q: expected a multiple of k_pages' 2 heads"),
        (0, lambda q: q[0], "q: expected 3 dimensions"),
        (1, lambda k: k.bfloat16(), "k_pages: expected float32, got bfloat16"),
        (1, lambda k: k[..., :8].contiguous(), "k_pages: expected shape .* = .any, any, any, 16"),
        (2, lambda v: v[1:], "v_pages: expected k_pages' shape"),
        (3, lambda table: table.long(), "page_table: expected int32, got int64"),
        (3, lambda table: table[:1], r"seq_lens: expected shape \[B\] = \[1\]"),
        (4, lambda lens: lens[:1], r"seq_lens: expected shape \[B\] = \[2\]"),
        (4, lambda lens: lens * 0 + 49, "seq_lens: expected 0 to 48, .* got 49 at index 0"),
        (4, lambda lens: lens * 0 - 1, "seq_lens: expected 0 to 48, .* got -1 at index 0"),
        (4, lambda lens: lens + 16, r"page_table: expected 0 to 5, .* got 2147483647 at index \[0"),
    ],
)
def test_errors_name_the_tensor(index, change, message):
    args = list(case([20, 9], 4, 2, 16, 16))
    args[index] = change(args[index])
    with pytest.raises(RuntimeError, match=message):
        ops.decode_attention(*args)


def test_opcheck():
    opcheck("decode_attention", *case([20, 9], 4, 2, 16, 16))
