import pytest
import torch

from checkpoints import TinyShape, build_tiny
from vox_serve.kv_cache import PAGE_SIZE, CacheBatch, CacheRows, CacheSequence, KvCache
from vox_serve.model_config import CsmConfig, TransformerConfig
from vox_serve.page_pool import PagePool, PrefixKeys


@pytest.fixture
def config() -> TransformerConfig:
    tiny = build_tiny(TinyShape(max_positions=5 * PAGE_SIZE - 3))
    return CsmConfig.from_json(tiny.config).backbone


@pytest.fixture
def cache(config) -> KvCache:
    return KvCache(config, 3, torch.float32, torch.device("cpu"))


@pytest.fixture
def cached(config) -> KvCache:
    return KvCache(config, 3, torch.float32, torch.device("cpu"), max_cached_pages=8)


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


def keys_of(*values: int) -> PrefixKeys:
    """Keys of one-column inputs."""
    keys = PrefixKeys()
    frames = torch.tensor(values)[:, None]
    keys.extend(frames, torch.ones_like(frames, dtype=torch.bool))
    return keys


def written(cache: KvCache, length: int) -> CacheSequence:
    """A sequence whose pages hold random numbers."""
    sequence = CacheSequence()
    cache.extend(sequence, length)
    for pages in (cache.k_pages, cache.v_pages):
        pages[:, sequence.pages] = torch.randn_like(pages[:, sequence.pages])
    return sequence


def test_a_living_sequence_shares_its_full_pages(cache):
    total = cache.num_free_pages
    length = 2 * PAGE_SIZE + 5
    keys = keys_of(*range(length))
    first = written(cache, length)
    cache.publish(first, keys)
    second = cache.find(keys, length)
    assert (second.length, second.pages) == (2 * PAGE_SIZE, first.pages[:2])
    assert cache.num_free_pages == total - 3
    cache.release(first, keys, length)
    assert cache.num_free_pages == total - 2  # the second holds the shared pages
    cache.extend(second, 1)
    assert second.pages[2] not in first.pages
    cache.release(second)
    assert cache.num_free_pages == total


def test_a_partial_page_is_copied(cached):
    length = PAGE_SIZE + 5
    keys = keys_of(*range(length))
    first = written(cached, length)
    pages = list(first.pages)
    expected = cached.k_pages[:, pages[1]].clone(), cached.v_pages[:, pages[1]].clone()
    cached.release(first, keys, length)
    for _ in range(2):
        second = cached.find(keys, length)
        assert second.length == length
        assert second.pages[0] == pages[0]
        assert second.pages[1] not in pages
        for tensor, contents in zip((cached.k_pages, cached.v_pages), expected, strict=True):
            assert torch.equal(tensor[:, second.pages[1]], contents)
            tensor[:, second.pages[1]] = 0  # the copy is its holder's alone
        cached.release(second)


@pytest.mark.parametrize("limit", [0, 1, PAGE_SIZE - 1, PAGE_SIZE, PAGE_SIZE + 4, PAGE_SIZE + 5])
def test_no_more_is_found_than_wanted(cached, limit):
    length = PAGE_SIZE + 5
    keys = keys_of(*range(length))
    cached.release(written(cached, length), keys, length)
    found = cached.find(keys, limit)
    assert found.length == (length if limit == length else limit // PAGE_SIZE * PAGE_SIZE)


def test_only_equal_inputs_are_found(cached):
    length = 2 * PAGE_SIZE
    cached.release(written(cached, length), keys_of(*range(length)), length)
    other = [*range(length)]
    other[PAGE_SIZE + 3] += 1
    assert cached.find(keys_of(*other), length).length == PAGE_SIZE
    other[0] += 1
    assert cached.find(keys_of(*other), length).length == 0


def test_a_mask_is_part_of_the_key():
    frames = torch.zeros(1, 2, dtype=torch.int64)
    masks = [torch.tensor([[a, b]]) for a in (True, False) for b in (True, False)]
    keys = [PrefixKeys() for _ in masks]
    for key, mask in zip(keys, masks, strict=True):
        key.extend(frames, mask)
    assert len({key[1] for key in keys}) == len(masks)
    masked = PrefixKeys()
    masked.extend(torch.tensor([[0, 7]]), masks[1])  # the model does not see the 7
    assert masked[1] == keys[1][1]


def test_keys_do_not_depend_on_how_they_were_made():
    whole, parts = keys_of(*range(40)), keys_of(*range(7))
    copy = parts.copy()
    parts.extend(torch.arange(7, 40)[:, None], torch.ones(33, 1, dtype=torch.bool))
    assert [whole[n] for n in range(41)] == [parts[n] for n in range(41)]
    with pytest.raises(IndexError):
        copy[8]


def test_the_end_of_a_prefix_is_given_up_before_its_beginning(config):
    cache = KvCache(config, 1, torch.float32, torch.device("cpu"), max_cached_pages=2)
    length = 3 * PAGE_SIZE + 5
    keys = keys_of(*range(length))
    cache.release(written(cache, length), keys, length)
    assert cache.num_cached_pages == 2
    assert cache.find(keys, length).length == 2 * PAGE_SIZE


def test_what_was_used_last_stays(config):
    cache = KvCache(config, 2, torch.float32, torch.device("cpu"), max_cached_pages=2)
    keys = [keys_of(*range(start, start + PAGE_SIZE)) for start in (0, 100, 200)]
    for i in (0, 1):
        cache.release(written(cache, PAGE_SIZE), keys[i], PAGE_SIZE)
    cache.release(cache.find(keys[0], PAGE_SIZE))
    cache.release(written(cache, PAGE_SIZE), keys[2], PAGE_SIZE)
    assert [cache.find(k, PAGE_SIZE).length for k in keys] == [PAGE_SIZE, 0, PAGE_SIZE]


def test_a_page_computed_twice_is_kept_once(cached):
    total = cached.num_free_pages
    keys = keys_of(*range(PAGE_SIZE))
    sequences = [written(cached, PAGE_SIZE) for _ in range(2)]
    first = sequences[0].pages[0]
    for sequence in sequences:
        cached.publish(sequence, keys)
        cached.release(sequence, keys, PAGE_SIZE)
    assert (cached.num_cached_pages, cached.num_free_pages) == (1, total)
    assert cached.find(keys, PAGE_SIZE).pages == [first]


def test_forgotten_pages_are_not_found(cached):
    total = cached.num_free_pages
    keys = keys_of(*range(PAGE_SIZE))
    cached.release(written(cached, PAGE_SIZE), keys, PAGE_SIZE)
    again = cached.find(keys, PAGE_SIZE)
    cached.forget(again)
    cached.release(again)
    assert cached.find(keys, PAGE_SIZE).length == 0
    assert (cached.num_cached_pages, cached.num_free_pages) == (0, total)


def test_cached_pages_give_way_to_sequences(config):
    """The pool of one sequence serves one after another, whatever is cached."""
    cache = KvCache(config, 1, torch.float32, torch.device("cpu"), max_cached_pages=100)
    cache._pool = PagePool(cache.pages_per_sequence, 100)
    for start in range(0, 1000, 100):
        sequence = CacheSequence()
        cache.extend(sequence, cache.max_positions)
        assert len(set(sequence.pages)) == cache.pages_per_sequence
        keys = keys_of(*range(start, start + cache.max_positions))
        cache.release(sequence, keys, cache.max_positions)
    cache.extend(CacheSequence(), cache.max_positions)
    with pytest.raises(RuntimeError, match="no page left"):
        cache.extend(CacheSequence(), 1)


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
        rows.write(row, sequence)
    for tensor in rows.tensors:  # the first sequence leaves, the last replaces it
        tensor[0] = tensor[2]
    rows.clear(2)
    live = sequences[2], sequences[1]
    for _ in range(2 * PAGE_SIZE):
        old = [len(sequence.pages) for sequence in live]
        expected = CacheBatch.decode(cache, [*live])
        new = [
            (row, old[row], sequence.pages[-1])
            for row, sequence in enumerate(live)
            if len(sequence.pages) > old[row]
        ]
        if new:
            rows.append_pages(new)
        batch = rows.batch(4)
        for name in ("positions", "slots", "seq_lens"):
            assert torch.equal(getattr(batch, name)[:2], getattr(expected, name)), name
        for row, sequence in enumerate(live):
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
