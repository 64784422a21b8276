"""The sequences of a batch: their state on the device, and one frame of some of them.

The state that changes from frame to frame is kept in tensors that are updated in place, one row per
sequence. So a frame needs no input from the host, and a GPU can run it as a CUDA graph.

A step runs the first rows only; the others are parked. `arrange` moves rows between steps, so that
the kernels and the graphs need no list of rows. A row of CSM-1B has 8.7 MB of codec state: moving
it takes 4 us on an H200 (4.8 TB/s), and a step moves few rows, if any. Kernels that take a list of
rows would read it in every step, and each number of rows would still need its graph.
"""

from collections.abc import Callable, Sequence
from enum import Enum
from functools import partial
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from vox_serve.cuda_graphs import Alternative, RowGraphs, rounded_rows
from vox_serve.kv_cache import CacheBatch, CacheRows, CacheSequence, KvCache, copy_to_device
from vox_serve.mimi import Mimi
from vox_serve.mimi.state import StreamState
from vox_serve.model import PERSISTENT_ROWS, CsmModel
from vox_serve.sampling import SamplingParams, SamplingRows
from voxkern.backend import OPS, backend_for

Member = TypeVar("Member")

NOT_FINITE = -1
"""The code that `sample_tokens` draws from logits that are not finite. A persistent depth decoder
that gives up a frame leaves lower ones."""

PADS = {"cpu": False, "cuda": True}
"""Whether a step works on a rounded number of rows (see `rounded_rows`), by device type."""


class Half(Enum):
    """The two halves of a frame."""

    BACKBONE = "backbone"
    DRAW = "draw"


class Frames(NamedTuple):
    """One frame of every row, on the CPU.

    Attributes:
        codes: `[B, K]` int64; see `levels` for negative ones.
        audio: `[B, frame_samples]` float32.
        copied: recorded on a GPU after the copies of both; None on a CPU.
    """

    codes: Tensor
    audio: Tensor
    copied: torch.cuda.Event | None

    def wait(self) -> None:
        """Wait for the copies from the GPU.

        Raises:
            RuntimeError: the depth decoder gave up a frame, so no row has valid codes.
        """
        if self.copied is not None:
            self.copied.synchronize()
        if self.codes.numpy().min() < NOT_FINITE:
            raise RuntimeError(
                "decode_depth's watchdog ended a frame: the blocks of its persistent kernel waited "
                "for each other in vain"
            )

    def spoken(self) -> list[bool]:
        """False for rows with a stop frame: Sesame's has only zeros."""
        found: list[bool] = np.any(self.codes.numpy(), axis=1).tolist()
        return found

    def levels(self) -> list[float]:
        """The root mean square of each row's samples; not finite if the row is not.

        Such a row has NaN or infinity in its hidden states, logits or audio. The first two have no
        code: `sample_tokens` draws -1 from logits that are not finite, and all logits of such a
        hidden state are NaN. So a GPU reports them without another copy.
        """
        audio = self.audio.numpy().astype(np.float64)  # squares of finite samples do not overflow
        levels = np.sqrt(np.square(audio, out=audio).mean(1))
        levels[self.codes.numpy().min(1) < 0] = np.nan
        found: list[float] = levels.tolist()
        return found


class _Views(NamedTuple):
    """The first rows of a batch's state."""

    frames: Tensor
    codes: Tensor
    mask: Tensor
    locations: CacheBatch
    hidden: Tensor
    audio: Tensor
    sampling: SamplingRows
    streams: StreamState


class FrameBatch(Generic[Member]):
    """Rows of state, and the two halves of a frame of the first rows.

    In each step, in inference mode, call `arrange`, `step_backbone`, `join` for new members, and
    `draw_frames`. A row that was not arranged to step keeps its state.

    Args:
        model: the two transformers.
        mimi: the codec, on the model's device.
        cache: keys and values of the backbone.
        max_rows: most members.
    """

    @torch.inference_mode()
    def __init__(self, model: CsmModel, mimi: Mimi, cache: KvCache, max_rows: int) -> None:
        self.model, self.mimi, self.cache = model, mimi, cache
        device, c = model.device, model.config
        self._max_rows = max_rows
        # A graph runs a rounded number of rows: as many must stay free of parked ones.
        rows = max_rows + max(self._padded(n) - n for n in range(1, max_rows + 1))
        self._members: list[Member | None] = [None] * rows
        self._rows: dict[Member, int] = {}
        self._new_pages: list[tuple[Member, int, int]] = []
        self._num_active = 0
        self._frames = torch.zeros(rows, c.num_codebooks + 1, dtype=torch.int64, device=device)
        self._mask = torch.zeros_like(self._frames, dtype=torch.bool)
        self._codes = self._frames[:, :-1]  # the last column would be a text token
        self._hidden = torch.zeros(rows, c.backbone.dim, dtype=model.dtype, device=device)
        self._audio = torch.zeros(max_rows, mimi.config.frame_samples, device=device)
        self._cache_rows = CacheRows(cache, rows)
        self._sampling = SamplingRows.empty(rows, device)
        self._streams = mimi.init_state(rows)
        self._views: dict[int, _Views] = {}
        self._graphs: RowGraphs[Half] | None = None
        # A graph cannot contain ops of the reference, which waits for the host.
        if device.type == "cuda" and all(backend_for("cuda", op) != "reference" for op in OPS):
            self._graphs = RowGraphs(self._functions(), max_rows, self._alternatives())
            self._hidden.zero_()

    def __contains__(self, member: object) -> bool:
        return member in self._rows

    @property
    def members(self) -> list[Member]:
        """The owners of the used rows, in the rows' order."""
        return [member for member in self._members if member is not None]

    @property
    def num_rows(self) -> int:
        """Rows that have state."""
        return len(self._members)

    def arrange(self, active: Sequence[Member], num_joining: int = 0) -> None:
        """Make some members the first rows, which step, and park the others.

        Args:
            active: members, all different.
            num_joining: calls of `join` that follow; their rows are kept free.
        """
        stepping = {self._rows[member] for member in active}
        self._num_active = count = len(active)
        if num_joining or len(stepping) < len(self._rows) or max(stepping, default=-1) >= count:
            self._park(stepping, num_joining)
        if self._new_pages:
            self._cache_rows.append_pages(
                [(self._rows[member], index, page) for member, index, page in self._new_pages]
            )
            self._new_pages.clear()

    def _park(self, stepping: set[int], num_joining: int) -> None:
        """Make the rows that step the first ones, and keep as many as join free after them."""
        count = len(stepping)
        used = self._padded(count + num_joining)
        unfilled = (row for row in range(count) if row not in stepping)
        moves = dict(zip((row for row in stepping if row >= count), unfilled, strict=False))
        parked = [
            row for row in range(used) if self._members[row] is not None and row not in stepping
        ]
        if parked:
            rows = range(used, len(self._members))
            moves |= zip(
                parked,
                (row for row in rows if self._members[row] is None or row in moves),
                strict=False,
            )
        if moves:
            self._move(moves)

    def _move(self, moves: dict[int, int]) -> None:
        """Move rows, from the keys to the values."""
        members = [self._members[row] for row in moves]
        left = moves.keys() - moves.values()
        for row in left:
            self._members[row] = None
        for member, row in zip(members, moves.values(), strict=True):
            assert member is not None
            self._members[row] = member
            self._rows[member] = row
        kept = self._codes, *self._cache_rows.tensors, *self._sampling, *self._streams.tensors
        if moves.keys().isdisjoint(moves.values()):  # as nearly always: cheaper than indices
            for source, target in moves.items():
                for tensor in kept:
                    tensor[target].copy_(tensor[source])
        else:
            both = torch.tensor([[*moves], [*moves.values()]])
            sources, targets = copy_to_device(both, self._codes.device)
            for tensor in kept:
                tensor.index_copy_(0, targets, tensor.index_select(0, sources))
        for row in left:
            self._cache_rows.clear(row)

    @torch.inference_mode()
    def join(
        self,
        member: Member,
        sequence: CacheSequence,
        params: SamplingParams,
        seed: int,
        hidden: Tensor,
    ) -> None:
        """Add a sequence whose prompt is in the cache; it gets a frame in this step.

        Args:
            member: the owner of the row.
            sequence: the sequence's pages.
            params, seed: how the sequence's codes are drawn.
            hidden: `[C]`, the backbone's last hidden state.
        """
        row = self._num_active
        assert self._members[row] is None, "arrange kept no row free"
        self._cache_rows.write(row, sequence)
        self._sampling.write(row, params, seed)
        self._streams.reset(row)
        self._hidden[row] = hidden
        self._members[row] = member
        self._rows[member] = row
        self._num_active += 1

    def append_page(self, member: Member, index: int, page: int) -> None:
        """Give a member's sequence another page, from the next call of `arrange` on.

        Args:
            member: the owner of the row.
            index: number of the sequence's pages before.
            page: the page.
        """
        self._new_pages.append((member, index, page))

    @torch.inference_mode()
    def suspend(self, member: Member) -> None:
        """Forget a member's pages. It must not step before `resume`."""
        self._cache_rows.clear(self._rows[member])

    @torch.inference_mode()
    def resume(self, member: Member, sequence: CacheSequence) -> None:
        """Give a member, whose other state was kept, the pages of its sequence."""
        self._cache_rows.write(self._rows[member], sequence)

    @torch.inference_mode()
    def leave(self, member: Member) -> None:
        """Remove a member. Not between `arrange` and `draw_frames`."""
        row = self._rows.pop(member)
        self._members[row] = None
        self._cache_rows.clear(row)

    @torch.inference_mode()
    def reset(self) -> None:
        """Remove all members, whatever state an interrupted frame left. Graphs are kept."""
        self._members = [None] * len(self._members)
        self._rows.clear()
        self._new_pages.clear()
        self._num_active = 0
        self._cache_rows.reset()
        for tensor in (self._codes, self._hidden, self._audio):
            tensor.zero_()
        for row in range(self._streams.batch_size):
            self._streams.reset(row)

    def step_backbone(self) -> None:
        """Turn the last frame of each row that steps into its next hidden state."""
        if self._num_active:
            self._run(Half.BACKBONE, self._num_active)

    def draw_frames(self) -> tuple[list[Member], Frames]:
        """Turn hidden states into frames, of the rows that step and of those that joined.

        On a GPU this returns before the frame is finished, and the next one may be begun.

        Returns:
            The members that step, and the frame of each.
        """
        rows = self._num_active
        self._run(Half.DRAW, rows)
        frames, audio = (
            tensor[:rows].to("cpu", non_blocking=True, copy=True)
            for tensor in (self._frames, self._audio)
        )
        copied = None
        if self.model.device.type == "cuda":
            copied = torch.cuda.Event()
            copied.record()
        members = [member for member in self._members[:rows] if member is not None]
        return members, Frames(frames[:, :-1], audio, copied)

    def _padded(self, rows: int) -> int:
        """The number of rows that the work for `rows` of them touches."""
        return rounded_rows(rows, self._max_rows) if rows and PADS[self.model.device.type] else rows

    def _run(self, half: Half, rows: int) -> None:
        rows = self._padded(rows)
        if self._graphs is None:
            self._functions()[half](rows)
        else:
            self._graphs(half, rows)

    def _functions(self) -> dict[Half, Callable[[int], None]]:
        return {Half.BACKBONE: self._run_backbone, Half.DRAW: self._run_draw}

    def _alternatives(self) -> list[Alternative[Half]]:
        """Alternatives for the graphs of a GPU.

        They are compared on unused rows, which are greedy: their codes depend on their hidden
        states alone.
        """
        native = backend_for("cuda", "decode_depth") == "native"
        if not native or self.model.dtype != torch.bfloat16:
            return []
        generator = torch.Generator(self._hidden.device).manual_seed(0)
        hidden = torch.empty_like(self._hidden).normal_(generator=generator)

        def prepare(rows: int) -> None:
            self._hidden.copy_(hidden)
            self._codes.fill_(-1)

        return [
            Alternative(
                name="persistent depth decoder",
                replaces=Half.DRAW,
                function=partial(self._run_draw, persistent=True),
                prepare=prepare,
                result=lambda rows: self._codes[:rows],
                max_rows=PERSISTENT_ROWS,
            )
        ]

    def _run_backbone(self, rows: int) -> None:
        view = self._view(rows)
        torch.ge(view.codes, 0, out=view.mask[:, :-1])  # codes that were not drawn are masked
        hidden = self.model.backbone_step(view.frames, view.mask, view.locations, self.cache)
        view.hidden.copy_(hidden)
        self._cache_rows.advance(rows)

    def _run_draw(self, rows: int, persistent: bool = False) -> None:
        view = self._view(rows)
        codes = self.model.draw_frames(view.hidden, view.sampling, persistent)
        view.sampling.advance(codes[:, 0])
        view.codes.copy_(codes)
        view.audio.copy_(self.mimi.decode_step(codes[:, None], view.streams))

    def _view(self, rows: int) -> _Views:
        """Views of the first rows, kept: a step of a small model has no time to make them."""
        if rows not in self._views:
            self._views[rows] = _Views(
                frames=self._frames[:rows],
                codes=self._codes[:rows],
                mask=self._mask[:rows],
                locations=self._cache_rows.batch(rows),
                hidden=self._hidden[:rows],
                audio=self._audio[:rows],
                sampling=self._sampling.view(rows),
                streams=self._streams.view(rows),
            )
        return self._views[rows]
