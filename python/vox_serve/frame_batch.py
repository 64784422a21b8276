"""The sequences of a batch: their state on the device, and one frame of all of them.

The state that changes from frame to frame is kept in tensors that are updated in place, one row per
sequence. So a frame needs no input from the host, and a GPU can run it as a CUDA graph.
"""

from collections.abc import Callable
from enum import Enum
from functools import partial
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from vox_serve.cuda_graphs import Alternative, RowGraphs
from vox_serve.kv_cache import CacheRows, CacheSequence, KvCache
from vox_serve.mimi import Mimi
from vox_serve.model import PERSISTENT_ROWS, CsmModel
from vox_serve.sampling import SamplingParams, SamplingRows
from voxkern.backend import OPS, backend_for

Member = TypeVar("Member")

NOT_FINITE = -1
"""The code that `sample_tokens` draws from logits that are not finite. A persistent depth decoder
that gives up a frame leaves lower ones."""


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
        if bool((self.codes < NOT_FINITE).any()):
            raise RuntimeError(
                "decode_depth's watchdog ended a frame: the blocks of its persistent kernel waited "
                "for each other in vain"
            )

    def levels(self) -> list[float]:
        """The root mean square of each row's samples; not finite if the row is not.

        Such a row has NaN or infinity in its hidden states, logits or audio. The first two have no
        code: `sample_tokens` draws -1 from logits that are not finite, and all logits of such a
        hidden state are NaN. So a GPU reports them without another copy.
        """
        # In float64 the squares of finite samples do not overflow.
        norms = torch.linalg.vector_norm(self.audio, dim=1, dtype=torch.float64)
        levels = norms / self.audio.shape[1] ** 0.5
        return levels.masked_fill((self.codes < 0).any(1), torch.nan).tolist()


class FrameBatch(Generic[Member]):
    """Rows of state, of which the first `len(members)` are used, and the two halves of a frame.

    Args:
        model: the two transformers.
        mimi: the codec, on the model's device.
        cache: keys and values of the backbone.
        max_rows: most rows.

    Attributes:
        members: the owner of each used row, in order.
    """

    @torch.inference_mode()
    def __init__(self, model: CsmModel, mimi: Mimi, cache: KvCache, max_rows: int) -> None:
        self.model, self.mimi, self.cache = model, mimi, cache
        self.members: list[Member] = []
        device, c = model.device, model.config
        self._codes = torch.zeros(max_rows, c.num_codebooks, dtype=torch.int64, device=device)
        self._hidden = torch.zeros(max_rows, c.backbone.dim, dtype=model.dtype, device=device)
        self._audio = torch.zeros(max_rows, mimi.config.frame_samples, device=device)
        self._cache_rows = CacheRows(cache, max_rows)
        self._sampling = SamplingRows.empty(max_rows, device)
        self._streams = mimi.init_state(max_rows)
        self._graphs: RowGraphs[Half] | None = None
        # A graph cannot contain ops of the reference, which waits for the host.
        if device.type == "cuda" and all(backend_for("cuda", op) != "reference" for op in OPS):
            self._graphs = RowGraphs(self._functions(), max_rows, self._alternatives())
            self._hidden.zero_()

    @torch.inference_mode()
    def join(
        self,
        member: Member,
        sequence: CacheSequence,
        params: SamplingParams,
        seed: int,
        hidden: Tensor,
    ) -> None:
        """Add a sequence whose prompt is in the cache.

        Args:
            member: the owner of the row.
            sequence: the sequence's pages, enough for all frames that follow.
            params, seed: how the sequence's codes are drawn.
            hidden: `[C]`, the backbone's last hidden state.
        """
        row = len(self.members)
        self._cache_rows.write(row, sequence)
        self._sampling.write(row, params, seed)
        self._streams.reset(row)
        self._hidden[row] = hidden
        self.members.append(member)

    @torch.inference_mode()
    def leave(self, member: Member) -> None:
        """Remove a member's row; the last row replaces it. Not between the halves of a frame."""
        row, last = self.members.index(member), len(self.members) - 1
        self.members[row] = self.members[last]
        self.members.pop()
        if row != last:
            for part in (self._cache_rows, self._sampling, self._streams):
                part.copy_row(last, row)
            self._codes[row] = self._codes[last]
        self._cache_rows.clear(last)

    @torch.inference_mode()
    def reset(self) -> None:
        """Remove all members, whatever state an interrupted frame left. Graphs are kept."""
        self.members.clear()
        self._cache_rows.reset()
        for tensor in (self._codes, self._hidden, self._audio):
            tensor.zero_()
        for row in range(self._streams.batch_size):
            self._streams.reset(row)

    @torch.inference_mode()
    def step_backbone(self) -> None:
        """Turn every row's last frame into its next hidden state."""
        if self.members:
            self._run(Half.BACKBONE, len(self.members))

    @torch.inference_mode()
    def draw_frames(self, first_row: int = 0) -> Frames:
        """Turn hidden states into frames, of every row or of those from `first_row` on.

        On a GPU this returns before the frame is finished, and the next one may be begun.
        """
        rows = len(self.members)
        if first_row:
            self._run_draw(rows, first_row=first_row)
        else:
            self._run(Half.DRAW, rows)
        codes, audio = (
            tensor[first_row:rows].to("cpu", non_blocking=True, copy=True)
            for tensor in (self._codes, self._audio)
        )
        copied = None
        if self.model.device.type == "cuda":
            copied = torch.cuda.Event()
            copied.record()
        return Frames(codes, audio, copied)

    def _run(self, half: Half, rows: int) -> None:
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
        frames, mask = self.model.next_inputs(self._codes[:rows])
        batch = self._cache_rows.batch(rows)
        self._hidden[:rows] = self.model.backbone_step(frames, mask, batch, self.cache)
        self._cache_rows.advance(rows)

    def _run_draw(self, rows: int, persistent: bool = False, first_row: int = 0) -> None:
        drawn = slice(first_row, rows)
        sampling = self._sampling.view(rows, first_row)
        codes = self.model.draw_frames(self._hidden[drawn], sampling, persistent)
        sampling.advance(codes[:, 0])
        self._codes[drawn] = codes
        self._audio[drawn] = self.mimi.decode_step(
            codes[:, None], self._streams.view(rows, first_row)
        )
