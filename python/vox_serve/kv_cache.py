"""The paged KV cache: pages of keys and values, page tables, prefixes shared by sequences."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from vox_serve.model_config import TransformerConfig
from vox_serve.page_pool import PagePool, PrefixKeys

PAGE_SIZE = 16


def copy_to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor to a device without waiting for the work in flight there."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


@dataclass
class CacheSequence:
    """The pages of one sequence.

    Attributes:
        length: number of positions written so far.
        pages: indices of its pages, in order of position.
    """

    length: int = 0
    pages: list[int] = field(default_factory=list)


class KvCache:
    """Keys and values of every layer in pages of 16 positions: two tensors `[L, P, Hkv, S, D]`.

    Pages are found again by what they hold. Sequences that begin alike share full pages; the
    positions of a partial page are copied. A page is not written to after it is shared.

    Args:
        config: sizes of the transformer.
        max_sequences: the pool has room for this many sequences of `max_positions`, unless
            `num_pages` is given.
        dtype: dtype of keys and values.
        device: device of the pages. On a CPU, the OS allocates memory when a page is first written.
        max_cached_pages: further pages, for prefixes that no sequence holds.
        num_kept_pages: further pages, for a sequence that is never released.
        num_pages: pages for the other sequences.

    Raises:
        ValueError: the pages have no room for one sequence of `max_positions`.
    """

    def __init__(
        self,
        config: TransformerConfig,
        max_sequences: int,
        dtype: torch.dtype,
        device: torch.device,
        max_cached_pages: int = 0,
        num_kept_pages: int = 0,
        num_pages: int | None = None,
    ) -> None:
        self.max_positions = config.max_positions
        self.max_cached_pages = max_cached_pages
        self.pages_per_sequence = -(-config.max_positions // PAGE_SIZE)
        if num_pages is None:
            num_pages = max_sequences * self.pages_per_sequence
        if num_pages < self.pages_per_sequence:
            raise ValueError(
                f"a sequence of {config.max_positions} positions takes {self.pages_per_sequence} "
                f"pages of {PAGE_SIZE}, got {num_pages}"
            )
        all_pages = num_pages + max_cached_pages + num_kept_pages
        shape = (config.num_layers, all_pages, config.num_kv_heads, PAGE_SIZE, config.head_dim)
        self.k_pages = torch.empty(shape, dtype=dtype, device=device)
        self.v_pages = torch.empty(shape, dtype=dtype, device=device)
        self.device = device
        self.reset()

    def reset(self) -> None:
        """Free all pages. Sequences that held some must not be used again."""
        self._pool = PagePool(self.k_pages.shape[1], self.max_cached_pages)

    @staticmethod
    def position_bytes(config: TransformerConfig, dtype: torch.dtype) -> int:
        """Bytes of the keys and values of one position."""
        return 2 * config.num_layers * config.num_kv_heads * config.head_dim * dtype.itemsize

    @staticmethod
    def sequence_bytes(config: TransformerConfig, dtype: torch.dtype) -> int:
        """Bytes of the keys and values of one sequence of `max_positions`."""
        positions = -(-config.max_positions // PAGE_SIZE) * PAGE_SIZE
        return positions * KvCache.position_bytes(config, dtype)

    @property
    def num_free_pages(self) -> int:
        """Pages that sequences can still take, cached ones included."""
        return self._pool.num_available

    @property
    def num_cached_pages(self) -> int:
        """Pages that no sequence holds and that a prompt may find again."""
        return self._pool.num_cached

    def counts(self) -> dict[str, int]:
        """Pages in all, held by sequences, and cached; and the bytes of these. Any thread may call
        this."""
        pages, cached = self.k_pages.shape[1], self._pool.num_cached
        held = pages - self._pool.num_available
        page_bytes = 2 * self.k_pages[:, 0].nbytes
        return {
            "pages": pages,
            "pages_held": held,
            "pages_cached": cached,
            "bytes_held": held * page_bytes,
            "bytes_cached": cached * page_bytes,
        }

    def num_needed_pages(self, keys: PrefixKeys, limit: int, count: int) -> int:
        """The free pages that `find` and then `reserve` would take.

        Args:
            keys, limit: see `find`.
            count: positions that the sequence is to have room for.
        """
        needed = -(-count // PAGE_SIZE)
        for end in range(PAGE_SIZE, limit + 1, PAGE_SIZE):
            if (page := self._pool.find(keys[end])) is None:
                break
            needed -= self._pool.is_held(page)
        return needed

    def extend(self, sequence: CacheSequence, count: int) -> range:
        """Reserve pages for `count` more positions of `sequence`, and count these as written.

        Returns:
            The new positions.

        Raises:
            ValueError: the sequence would outgrow `max_positions`.
        """
        start = sequence.length
        self.reserve(sequence, count)
        sequence.length += count
        return range(start, sequence.length)

    def reserve(self, sequence: CacheSequence, count: int) -> None:
        """Reserve pages for `count` more positions of `sequence`; its length stays the same.

        Raises:
            ValueError: the sequence would outgrow `max_positions`.
        """
        end = sequence.length + count
        if end > self.max_positions:
            raise ValueError(f"{end} positions exceed the context of {self.max_positions}")
        while len(sequence.pages) * PAGE_SIZE < end:
            sequence.pages.append(self._pool.take())

    def find(self, keys: PrefixKeys, limit: int) -> CacheSequence:
        """A new sequence that begins with the longest prefix found in the cache.

        Args:
            keys: keys of the sequence's inputs.
            limit: longest prefix, in positions.
        """
        found = CacheSequence()
        while (end := found.length + PAGE_SIZE) <= limit:
            if (page := self._pool.find(keys[end])) is None:
                break
            self._pool.hold(page)
            found.pages.append(page)
            found.length = end
        start = found.length
        for end in range(min(limit, start + PAGE_SIZE - 1), start, -1):
            if (page := self._pool.find(keys[end])) is not None:
                self._pool.hold(page)  # or `take` might give this very page
                if not self._pool.num_available:
                    self._pool.drop(page)
                    break
                copy = self._pool.take()
                for pages in (self.k_pages, self.v_pages):
                    pages[:, copy] = pages[:, page]
                self._pool.drop(page)
                found.pages.append(copy)
                found.length = end
                break
        return found

    def publish(self, sequence: CacheSequence, keys: PrefixKeys, grows: bool = True) -> None:
        """Let other sequences find the pages of one.

        Args:
            sequence: its positions are written, or will be before any later use of the cache.
            keys: keys of its inputs.
            grows: it may grow further, so that only its full pages can be shared.
        """
        for i, page in enumerate(sequence.pages):
            end = min((i + 1) * PAGE_SIZE, sequence.length)
            if end % PAGE_SIZE == 0 or not grows:
                self._pool.name(page, keys[end])

    def release(
        self, sequence: CacheSequence, keys: PrefixKeys | None = None, length: int = 0
    ) -> None:
        """Give up the sequence's pages.

        Args:
            sequence: it becomes empty.
            keys: keys of its inputs; None to publish none of its pages.
            length: positions to publish, those of a partial last page included. As in `publish`,
                they are written, or will be before any later use of the cache.
        """
        # Backwards: the end of a sequence is given up before its beginning, without which it
        # could not be found.
        for i in reversed(range(len(sequence.pages))):
            page, start = sequence.pages[i], i * PAGE_SIZE
            if keys is not None and start < length:
                self._pool.name(page, keys[min(start + PAGE_SIZE, length)])
            self._pool.drop(page)
        sequence.pages, sequence.length = [], 0

    def is_finite(self, sequence: CacheSequence) -> bool:
        """True if no key or value of a sequence is NaN or infinite. Waits for the device."""
        full, rest = divmod(sequence.length, PAGE_SIZE)
        whole, partial = sequence.pages[:full], sequence.pages[full : full + 1]
        return all(
            bool(pages[:, whole].isfinite().all() & pages[:, partial, :, :rest].isfinite().all())
            for pages in (self.k_pages, self.v_pages)
        )

    def forget(self, sequence: CacheSequence) -> None:
        """Let no further sequence find the pages that this one holds."""
        for page in sequence.pages:
            self._pool.forget(page)


@dataclass(frozen=True)
class CacheBatch:
    """Cache locations of the tokens of one forward pass, as arguments of the attention ops.

    Attributes:
        positions: `[T]` int64, position of each token in its sequence.
        slots: `[T]` int64, slot of each token in the page pool.
        page_table: `[B, M]` int32.
        seq_lens: `[B]` int32, including the new tokens.
        cu_seqlens: `[B + 1]` int32, index of each sequence's first token; None when decoding one
            token per sequence.
        last_tokens: `[B]` int64, index of each sequence's last token; None if `cu_seqlens` is.
    """

    positions: Tensor
    slots: Tensor
    page_table: Tensor
    seq_lens: Tensor
    cu_seqlens: Tensor | None
    last_tokens: Tensor | None

    @classmethod
    def prefill(
        cls, cache: KvCache, sequences: list[CacheSequence], counts: list[int]
    ) -> "CacheBatch":
        """Extend sequence b by `counts[b]` tokens: one ragged batch."""
        positions: list[int] = []
        slots: list[int] = []
        ends = [0]
        for sequence, count in zip(sequences, counts, strict=True):
            new = cache.extend(sequence, count)
            positions += new
            slots += [sequence.pages[p // PAGE_SIZE] * PAGE_SIZE + p % PAGE_SIZE for p in new]
            ends.append(ends[-1] + count)
        width = max(len(s.pages) for s in sequences)
        table = [s.pages + [0] * (width - len(s.pages)) for s in sequences]

        def tensor(values: list[Any], dtype: torch.dtype) -> Tensor:
            return copy_to_device(torch.tensor(values, dtype=dtype), cache.device)

        return cls(
            positions=tensor(positions, torch.int64),
            slots=tensor(slots, torch.int64),
            page_table=tensor(table, torch.int32),
            seq_lens=tensor([s.length for s in sequences], torch.int32),
            cu_seqlens=tensor(ends, torch.int32),
            last_tokens=tensor([end - 1 for end in ends[1:]], torch.int64),
        )

    @classmethod
    def decode(cls, cache: KvCache, sequences: list[CacheSequence]) -> "CacheBatch":
        """Extend every sequence by one token."""
        batch = cls.prefill(cache, sequences, [1] * len(sequences))
        return replace(batch, cu_seqlens=None, last_tokens=None)


class CacheRows:
    """Sequences that grow by one position per frame, without help from the host.

    Args:
        cache: the cache that holds the sequences.
        max_rows: most sequences.
    """

    def __init__(self, cache: KvCache, max_rows: int) -> None:
        device = cache.device
        # The next position and its slot, and what a step adds to both: 1, or 0 in an unused row.
        self._next = torch.zeros(3, max_rows, dtype=torch.int64, device=device)
        self._seq_lens = torch.zeros(max_rows, dtype=torch.int32, device=device)
        shape = max_rows, cache.pages_per_sequence
        self._page_table = torch.zeros(shape, dtype=torch.int32, device=device)
        self._unused = torch.tensor([0, -1, 0], device=device)
        self.reset()

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All state, a row for each sequence."""
        return self._next.T, self._seq_lens, self._page_table

    def write(self, row: int, sequence: CacheSequence) -> None:
        """Assign a row to a sequence. If its pages are full, `append_pages` before its step."""
        pages, length = sequence.pages, sequence.length
        page = pages[length // PAGE_SIZE] if length < len(pages) * PAGE_SIZE else 0
        values = torch.tensor([length, page * PAGE_SIZE + length % PAGE_SIZE, 1, *pages])
        values = copy_to_device(values, self._next.device)
        self._next[:, row] = values[:3]
        self._page_table[row, : len(pages)] = values[3:]
        self._seq_lens[row] = length + 1

    def append_pages(self, pages: Sequence[tuple[int, int, int]]) -> None:
        """Give rows whose pages are full one more, without waiting for the device.

        Args:
            pages: row, index in its sequence, and page.
        """
        entries = torch.tensor(pages).T.contiguous()
        rows, columns, numbers = copy_to_device(entries, self._next.device)
        self._page_table[rows, columns] = numbers.int()
        self._next[1, rows] = numbers * PAGE_SIZE

    def clear(self, row: int) -> None:
        """Mark a row as unused: the ops write nothing for it."""
        self._next[:, row] = self._unused
        self._seq_lens[row] = 1

    def reset(self) -> None:
        """Mark all rows as unused."""
        self._next.copy_(self._unused[:, None])
        self._seq_lens.fill_(1)
        self._page_table.zero_()

    def batch(self, rows: int) -> CacheBatch:
        """Cache locations of the next tokens of the first `rows` rows: views, which `advance`
        moves on."""
        positions, slots, _ = self._next[:, :rows]
        return CacheBatch(
            positions=positions,
            slots=slots,
            page_table=self._page_table[:rows],
            seq_lens=self._seq_lens[:rows],
            cu_seqlens=None,
            last_tokens=None,
        )

    def advance(self, rows: int) -> None:
        """Count the next tokens of the first `rows` rows as written."""
        steps = self._next[2, :rows]
        self._next[:2, :rows] += steps
        self._seq_lens[:rows] += steps
