import pytest
import torch

from checkpoints import TinyShape, build_tiny
from vox_serve.kv_cache import PAGE_SIZE, CacheBatch, CacheRows, CacheSequence, KvCache
from vox_serve.model_config import CsmConfig, TransformerConfig


@pytest.fixture
def config() -> TransformerConfig:
    tiny = build_tiny(TinyShape(max_positions=5 * PAGE_SIZE - 3))
    return CsmConfig.from_json(tiny.config).backbone


@pytest.fixture
def cache(config) -> KvCache:
    return KvCache(config, 3, torch.float32, torch.device("cpu"))


def test_bytes_of_a_sequence(config, cache):
    pages = cache.k_pages.nbytes + cache.v_pages.nbytes
    assert 3 * KvCache.sequence_bytes(config, torch.float32) == pages


def test_extend_takes_pages_on_demand(cache):
    total = cache.num_free_pages
    sequence = CacheSequence()
    assert cache.extend(sequence, PAGE_SIZE) == range(PAGE_SIZE)
    assert len(sequence.pages) == 1
    assert cache.extend(sequence, 1) == range(PAGE_SIZE, PAGE_SIZE + 1)
    assert len(set(sequence.pages)) == 2
    assert cache.num_free_pages == total - 2
    cache.release(sequence)
    assert cache.num_free_pages == total
    assert sequence == CacheSequence()


def test_every_sequence_can_fill_the_context(cache):
    sequences = [CacheSequence() for _ in range(3)]
    for sequence in sequences:
        cache.extend(sequence, cache.max_positions)
    pages = [page for sequence in sequences for page in sequence.pages]
    assert len(set(pages)) == len(pages)
    with pytest.raises(ValueError, match="exceed the context"):
        cache.extend(sequences[0], 1)


def test_fork_shares_full_pages_and_copies_the_partial_one(cache):
    total = cache.num_free_pages
    prefix = CacheSequence()
    cache.extend(prefix, 2 * PAGE_SIZE + 5)
    cache.k_pages.normal_()
    cache.v_pages.normal_()
    fork = cache.fork(prefix)
    assert fork.length == prefix.length
    assert fork.pages[:2] == prefix.pages[:2]
    assert fork.pages[2] not in prefix.pages
    assert torch.equal(cache.k_pages[:, fork.pages[2]], cache.k_pages[:, prefix.pages[2]])
    assert torch.equal(cache.v_pages[:, fork.pages[2]], cache.v_pages[:, prefix.pages[2]])
    cache.release(prefix)
    assert cache.num_free_pages == total - 3  # the fork still owns the shared pages
    cache.release(fork)
    assert cache.num_free_pages == total


def test_fork_of_whole_pages_copies_nothing(cache):
    prefix = CacheSequence()
    cache.extend(prefix, PAGE_SIZE)
    free = cache.num_free_pages
    fork = cache.fork(prefix)
    assert cache.num_free_pages == free
    cache.extend(fork, 1)
    assert prefix.pages == fork.pages[:1]


def test_prefill_batch(cache):
    old, new = CacheSequence(), CacheSequence()
    cache.extend(old, PAGE_SIZE - 1)
    batch = CacheBatch.prefill(cache, [old, new], [3, 2])
    assert batch.positions.tolist() == [PAGE_SIZE - 1, PAGE_SIZE, PAGE_SIZE + 1, 0, 1]
    first, second = (page * PAGE_SIZE for page in old.pages)
    other = new.pages[0] * PAGE_SIZE
    assert batch.slots.tolist() == [
        *(first + PAGE_SIZE - 1, second, second + 1),
        *(other, other + 1),
    ]
    assert batch.page_table[0].tolist() == old.pages
    assert batch.page_table[1, 0] == new.pages[0]
    assert batch.seq_lens.tolist() == [PAGE_SIZE + 2, 2]
    assert batch.cu_seqlens.tolist() == [0, 3, 5]
    assert batch.last_tokens.tolist() == [2, 4]


def test_decode_batch(cache):
    sequences = [CacheSequence(), CacheSequence()]
    cache.extend(sequences[0], 7)
    batch = CacheBatch.decode(cache, sequences)
    assert batch.positions.tolist() == [7, 0]
    assert batch.seq_lens.tolist() == [8, 1]
    assert batch.cu_seqlens is None


def test_rows_advance_without_the_host(cache):
    """At each step their locations equal those of `CacheBatch.decode`."""
    sequences = [CacheSequence(), CacheSequence(), CacheSequence()]
    rows = CacheRows(cache, 4)
    for row, (sequence, length) in enumerate(zip(sequences, (PAGE_SIZE - 2, 3, 9), strict=True)):
        cache.extend(sequence, length)
        cache.reserve(sequence, 2 * PAGE_SIZE)
        rows.write(row, sequence)
    rows.copy_row(2, 0)  # the first sequence leaves, the last replaces it
    rows.clear(2)
    for _ in range(2 * PAGE_SIZE):
        expected = CacheBatch.decode(cache, [sequences[2], sequences[1]])
        batch = rows.batch(4)
        for name in ("positions", "slots", "seq_lens"):
            assert torch.equal(getattr(batch, name)[:2], getattr(expected, name)), name
        for row, sequence in enumerate((sequences[2], sequences[1])):
            assert batch.page_table[row, : len(sequence.pages)].tolist() == sequence.pages
        assert batch.slots[2:].tolist() == [-1, -1]
        assert batch.positions[2:].tolist() == [0, 0]
        rows.advance(4)


def test_reserve_counts_nothing(cache):
    sequence = CacheSequence()
    cache.reserve(sequence, PAGE_SIZE + 1)
    assert sequence.length == 0
    assert len(sequence.pages) == 2
    with pytest.raises(ValueError, match="exceed the context"):
        cache.reserve(sequence, cache.max_positions + 1)
