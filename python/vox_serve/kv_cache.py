"""The paged KV cache: a pool of pages, page tables, prefixes that sequences share."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from vox_serve.model_config import TransformerConfig

PAGE_SIZE = 16


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on a device, without waiting for what that one is about."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


@dataclass
class CacheSequence:
    """One sequence's place in the cache.

    Attributes:
        length: positions written so far.
        pages: page numbers, in order of position.
    """

    length: int = 0
    pages: list[int] = field(default_factory=list)


class KvCache:
    """Keys and values of every layer in pages of 16 positions, `[L, P, Hkv, S, D]` each.

    A page belongs to one sequence, or is full and shared by the sequences forked from a prefix.

    Args:
        config: of the transformer whose keys and values these are.
        max_sequences: the pool has room for so many of `max_positions`.
        dtype: of keys and values.
        device: where they lie. On a CPU, memory is taken as it is first written.
    """

    def __init__(
        self,
        config: TransformerConfig,
        max_sequences: int,
        dtype: torch.dtype,
        device: torch.device,
    ):
        self.max_positions = config.max_positions
        self.pages_per_sequence = -(-config.max_positions // PAGE_SIZE)
        num_pages = max_sequences * self.pages_per_sequence
        shape = (config.num_layers, num_pages, config.num_kv_heads, PAGE_SIZE, config.head_dim)
        self.k_pages = torch.empty(shape, dtype=dtype, device=device)
        self.v_pages = torch.empty(shape, dtype=dtype, device=device)
        self.device = device
        self._free = list(range(num_pages - 1, -1, -1))
        self._owners = [0] * num_pages

    @staticmethod
    def sequence_bytes(config: TransformerConfig, dtype: torch.dtype) -> int:
        """Memory for the keys and values of `max_positions`."""
        positions = -(-config.max_positions // PAGE_SIZE) * PAGE_SIZE
        elements = 2 * config.num_layers * positions * config.num_kv_heads * config.head_dim
        return elements * dtype.itemsize

    @property
    def num_free_pages(self) -> int:
        return len(self._free)

    def _take_page(self) -> int:
        page = self._free.pop()
        self._owners[page] = 1
        return page

    def extend(self, sequence: CacheSequence, count: int) -> range:
        """Give `sequence` room for `count` more positions, and count them as written.

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
        """Give `sequence` the pages for `count` more positions, without counting them.

        Raises:
            ValueError: the sequence would outgrow `max_positions`.
        """
        end = sequence.length + count
        if end > self.max_positions:
            raise ValueError(f"{end} positions exceed the context of {self.max_positions}")
        while len(sequence.pages) * PAGE_SIZE < end:
            sequence.pages.append(self._take_page())

    def fork(self, prefix: CacheSequence) -> CacheSequence:
        """A sequence that continues `prefix`: full pages are shared, a partial one is copied."""
        num_full = prefix.length // PAGE_SIZE
        fork = CacheSequence(prefix.length, prefix.pages[:num_full])
        for page in fork.pages:
            self._owners[page] += 1
        if num_full < len(prefix.pages):
            page = self._take_page()
            self.k_pages[:, page] = self.k_pages[:, prefix.pages[num_full]]
            self.v_pages[:, page] = self.v_pages[:, prefix.pages[num_full]]
            fork.pages.append(page)
        return fork

    def release(self, sequence: CacheSequence) -> None:
        """Give the sequence's pages back; a shared page goes with its last owner."""
        for page in sequence.pages:
            self._owners[page] -= 1
            if self._owners[page] == 0:
                self._free.append(page)
        sequence.pages, sequence.length = [], 0


@dataclass(frozen=True)
class CacheBatch:
    """Where the tokens of one forward pass lie: the arguments that the attention ops take.

    Attributes:
        positions: `[T]` int64, within each token's sequence.
        slots: `[T]` int64, in the page pool.
        page_table: `[B, M]` int32.
        seq_lens: `[B]` int32, the new tokens included.
        cu_seqlens: `[B + 1]` int32, each sequence's first token; None to decode one token each.
        last_tokens: `[B]` int64, index of each sequence's last token; None like `cu_seqlens`.
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
        """Room for `counts[b]` more tokens in every sequence, as one ragged batch."""
        positions, slots, ends = [], [], [0]
        for sequence, count in zip(sequences, counts, strict=True):
            new = cache.extend(sequence, count)
            positions += new
            slots += [sequence.pages[p // PAGE_SIZE] * PAGE_SIZE + p % PAGE_SIZE for p in new]
            ends.append(ends[-1] + count)
        width = max(len(s.pages) for s in sequences)
        table = [s.pages + [0] * (width - len(s.pages)) for s in sequences]

        def tensor(values: list, dtype: torch.dtype) -> Tensor:
            return send(torch.tensor(values, dtype=dtype), cache.device)

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
        """Room for one more token in every sequence."""
        batch = cls.prefill(cache, sequences, [1] * len(sequences))
        return replace(batch, cu_seqlens=None, last_tokens=None)


class CacheRows:
    """Sequences that grow by one position at a time, without a word from the host.

    Args:
        cache: theirs.
        max_rows: sequences that there is room for.
    """

    def __init__(self, cache: KvCache, max_rows: int):
        def zeros(dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.zeros((max_rows, *shape), dtype=dtype, device=cache.device)

        self._positions = zeros(torch.int64)
        self._steps = zeros(torch.int64)  # 1, or 0 in a row that is not in use
        self._page_table = zeros(torch.int32, cache.pages_per_sequence)

    def write(self, row: int, sequence: CacheSequence) -> None:
        """Make a row that of a sequence which has pages for all that is to come."""
        pages = torch.tensor(sequence.pages, dtype=torch.int32)
        self._page_table[row, : len(pages)] = send(pages, self._page_table.device)
        self._positions[row] = sequence.length
        self._steps[row] = 1

    def clear(self, row: int) -> None:
        """Take a row out of use: nothing is written for it."""
        self._positions[row] = 0
        self._steps[row] = 0

    def copy_row(self, source: int, target: int) -> None:
        """Make one row in use what another is."""
        for tensor in (self._positions, self._page_table):
            tensor[target] = tensor[source]

    def batch(self, rows: int) -> CacheBatch:
        """Where the next tokens of the first rows lie."""
        positions, table = self._positions[:rows], self._page_table[:rows]
        pages = table.gather(1, positions[:, None] // PAGE_SIZE)[:, 0]
        slots = torch.where(self._steps[:rows] > 0, pages * PAGE_SIZE + positions % PAGE_SIZE, -1)
        return CacheBatch(
            positions=positions,
            slots=slots,
            page_table=table,
            seq_lens=(positions + 1).int(),
            cu_seqlens=None,
            last_tokens=None,
        )

    def advance(self, rows: int) -> None:
        """Count the next tokens of the first rows as written."""
        self._positions[:rows] += self._steps[:rows]
