import pytest
import torch

from kv_testing import paged, random_sequences, strided_heads
from op_cases.prefill_attention import case, offsets
from ops_testing import DTYPES, assert_close, opcheck, reference
from voxkern import ops

SHAPES = [
    # new, prefix, Hq, Hkv, D, S
    ([1], [0], 32, 8, 64, 16),
    ([130], [0], 8, 2, 64, 16),
    ([40, 1, 0, 66, 0], [100, 63, 30, 0, 0], 8, 2, 128, 16),
    ([200], [1848], 4, 1, 64, 16),
    ([33, 70], [64, 5], 3, 3, 80, 17),
    ([7, 90], [60, 0], 6, 3, 2, 1),
    ([65], [3], 6, 2, 16, 16),
    ([50, 20], [0, 200], 5, 1, 34, 64),
    ([131], [0], 8, 1, 16, 300),
    ([20], [1], 7, 1, 33, 16),
    ([3, 2], [70, 0], 300, 2, 16, 16),
    ([0, 0], [5, 0], 4, 4, 16, 16),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_prefill_attention(target, shape, dtype):
    new, prefix, num_heads, *rest = shape
    if max(prefix) > 1000:
        new, prefix = [target.few(n) for n in new], [target.few(n) for n in prefix]
    args = case(new, prefix, target.at_most(40, num_heads), *rest, dtype)
    got = target.run("prefill_attention", *args)
    assert got.is_contiguous()
    assert_close(got, reference("prefill_attention", *args))


def test_equals_scaled_dot_product_attention(target):
    k, v = (random_sequences([100], 2, 64)[0] for _ in range(2))
    q = strided_heads(100, 8, 64)
    k_pages, v_pages, page_table, seq_lens = paged([k], [v], 16)
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(0, 1)[None] for x in (q, k, v)), is_causal=True, scale=0.3, enable_gqa=True
    )
    got = target.run(
        "prefill_attention", q, k_pages, v_pages, page_table, offsets([100]), seq_lens, 0.3
    )
    assert_close(got, expected[0].transpose(0, 1))


def test_the_future_is_not_seen(target):
    """The first queries give the same bits without the later keys and values."""
    k, v = (random_sequences([96], 2, 16)[0] for _ in range(2))
    q = strided_heads(96, 4, 16)
    whole = target.run("prefill_attention", q, *with_queries(paged([k], [v], 16), [96]), 0.25)
    for tokens in (1, 17, 63, 64, 65):
        part = target.run(
            "prefill_attention",
            q[:tokens],
            *with_queries(paged([k[:tokens]], [v[:tokens]], 16), [tokens]),
            0.25,
        )
        assert torch.equal(part, whole[:tokens])


def with_queries(pages: tuple, new: list[int]) -> tuple:
    k_pages, v_pages, page_table, seq_lens = pages
    return k_pages, v_pages, page_table, offsets(new), seq_lens


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cuts", [[0, 64, 128], [0, 1, 2, 50, 147], [0, 149], [0, 100, 101]])
def test_bits_do_not_depend_on_the_chunks(target, cuts, dtype):
    total = 150
    k, v = (random_sequences([total], 2, 64, dtype)[0] for _ in range(2))
    q = strided_heads(total, 6, 64, dtype)
    whole = target.run("prefill_attention", q, *with_queries(paged([k], [v], 16), [total]), 0.125)
    for begin, end in zip(cuts, [*cuts[1:], total], strict=True):
        pages = paged([k[:end]], [v[:end]], 16)
        chunk = target.run(
            "prefill_attention", q[begin:end], *with_queries(pages, [end - begin]), 0.125
        )
        assert torch.equal(chunk, whole[begin:end])


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_the_batch_or_the_pages(target, dtype):
    new, prefix = [70, 3, 1, 40], [10, 90, 64, 0]
    lengths = [n + m for n, m in zip(new, prefix, strict=True)]
    k, v = (random_sequences(lengths, 2, 32, dtype) for _ in range(2))
    q = strided_heads(sum(new), 8, 32, dtype)
    together = target.run("prefill_attention", q, *with_queries(paged(k, v, 16), new), 0.2)
    begin = 0
    for b, tokens in enumerate(new):
        for page_size in (1, 17) if target.interpreted else (16, 1, 17, 256):
            pages = paged(k[b : b + 1], v[b : b + 1], page_size)
            alone = target.run(
                "prefill_attention",
                q[begin : begin + tokens],
                *with_queries(pages, [tokens]),
                0.2,
            )
            assert torch.equal(alone, together[begin : begin + tokens])
        begin += tokens


def test_bits_do_not_depend_on_the_threads():
    args = case([300, 30], [0, 100], 8, 2, 64, 16)
    before = torch.ops.voxkern.num_threads()
    results = []
    for threads in (1, 2, 5):
        torch.ops.voxkern.set_num_threads(threads)
        results.append(ops.prefill_attention(*args))
    torch.ops.voxkern.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_large_scores_do_not_overflow(target):
    k = torch.zeros(130, 1, 16)
    k[:, 0, 0] = torch.linspace(-1000, 1000, 130)
    v = torch.randn(130, 1, 16)
    q = torch.zeros(130, 1, 16)
    q[:, 0, 0] = torch.randn(130).sign()
    args = (q, *with_queries(paged([k], [v], 16), [130]), 1.0)
    assert_close(target.run("prefill_attention", *args), reference("prefill_attention", *args))


@pytest.mark.parametrize(
    ("index", "change", "message"),
    [
        (0, lambda q: q[:, :3], "q: expected a multiple of k_pages' 2 heads"),
        (0, lambda q: q[:8], "cu_seqlens: expected 0 to T = 8, got 0 to 9"),
        (1, lambda k: k.bfloat16(), "k_pages: expected float32, got bfloat16"),
        (2, lambda v: v[1:], "v_pages: expected k_pages' shape"),
        (3, lambda table: table.long(), "page_table: expected int32, got int64"),
        (4, lambda cu: cu[:2], r"cu_seqlens: expected shape \[B \+ 1\] = \[3\], got \[2\]"),
        (4, lambda cu: cu.long(), "cu_seqlens: expected int32, got int64"),
        (4, lambda cu: cu.new_tensor([1, 4, 9]), "cu_seqlens: expected 0 to T = 9, got 1 to 9"),
        (4, lambda cu: cu.new_tensor([0, -1, 9]), "0 to 14 new tokens of sequence 0, .* got -1"),
        (5, lambda lens: lens.new_tensor([14, 4]), "0 to 4 new tokens of sequence 1, .* got 5"),
        (5, lambda lens: lens + 99, "seq_lens: expected 0 to 32, .* got 113 at index 0"),
        (5, lambda lens: lens + 3, r"page_table: expected 0 to 4, .* got 2147483647 at index \[0"),
    ],
)
def test_errors_name_the_tensor(index, change, message):
    args = list(case([4, 5], [10, 3], 4, 2, 16, 16))
    args[index] = change(args[index])
    with pytest.raises(RuntimeError, match=message):
        ops.prefill_attention(*args)


def test_opcheck():
    opcheck("prefill_attention", *case([4, 5], [10, 3], 4, 2, 16, 16))
