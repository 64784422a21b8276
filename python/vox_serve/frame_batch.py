"""The sequences that speak together: their state on the device, and a frame of all of them.

All that changes from frame to frame lies in tensors that are updated in place, a row for each
sequence. So a frame needs nothing from the host, and a GPU can run it as a CUDA graph.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from vox_serve.cuda_graphs import Alternative, RowGraphs
from vox_serve.kv_cache import CacheRows, CacheSequence, KvCache
from vox_serve.mimi import Mimi
from vox_serve.model import PERSISTENT_ROWS, CsmModel
from vox_serve.sampling import SamplingParams, SamplingRows
from voxkern.backend import OPS, backend_for


class Frames(NamedTuple):
    """A frame of every row, on the CPU.

    Attributes:
        codes: `[B, K]` int64.
        audio: `[B, frame_samples]` float32.
        copied: of a GPU, after which the two are there; None if they are.
    """

    codes: Tensor
    audio: Tensor
    copied: torch.cuda.Event | None

    def wait(self) -> None:
        """Until they are there.

        Raises:
            RuntimeError: the depth decoder gave a frame up: there is nothing to be spoken.
        """
        if self.copied is not None:
            self.copied.synchronize()
        if bool((self.codes < 0).any()):
            raise RuntimeError(
                "decode_depth's watchdog ended a frame: blocks of its persistent kernel waited for "
                "each other in vain"
            )


class FrameBatch:
    """Rows of state, the first `len(members)` in use, and the two halves of a frame.

    Args:
        model: the two transformers.
        mimi: the codec, on the model's device.
        cache: keys and values of the backbone.
        max_rows: rows that there is room for.

    Attributes:
        members: whose the rows are, in their order.
    """

    @torch.inference_mode()
    def __init__(self, model: CsmModel, mimi: Mimi, cache: KvCache, max_rows: int):
        self.model, self.mimi, self.cache = model, mimi, cache
        self.members: list[object] = []
        device, c = model.device, model.config
        self._codes = torch.zeros(max_rows, c.num_codebooks, dtype=torch.int64, device=device)
        self._hidden = torch.zeros(max_rows, c.backbone.dim, dtype=model.dtype, device=device)
        self._audio = torch.zeros(max_rows, mimi.config.frame_samples, device=device)
        self._cache_rows = CacheRows(cache, max_rows)
        self._sampling = SamplingRows.empty(max_rows, device)
        self._streams = mimi.init_state(max_rows)
        self._graphs = None
        # The reference waits for the host: in a graph no op may be its.
        if device.type == "cuda" and all(backend_for("cuda", op) != "reference" for op in OPS):
            functions = self._run_backbone, self._run_draw
            self._graphs = RowGraphs(functions, max_rows, self._alternatives())
            self._hidden.zero_()

    @torch.inference_mode()
    def join(
        self,
        member: object,
        sequence: CacheSequence,
        params: SamplingParams,
        seed: int,
        hidden: Tensor,
    ) -> None:
        """Take in a sequence whose prompt is in the cache.

        Args:
            member: whose the row is.
            sequence: its place in the cache, with pages for all frames to come.
            params, seed: how its codes are drawn.
            hidden: `[C]`, the backbone's last hidden state.
        """
        row = len(self.members)
        self._cache_rows.write(row, sequence)
        self._sampling.write(row, params, seed)
        self._streams.reset(row)
        self._hidden[row] = hidden
        self.members.append(member)

    @torch.inference_mode()
    def leave(self, member: object) -> None:
        """Drop a member's row; the last one takes its place. Not between the halves of a frame."""
        row, last = self.members.index(member), len(self.members) - 1
        self.members[row] = self.members[last]
        self.members.pop()
        if row != last:
            for part in (self._cache_rows, self._sampling, self._streams):
                part.copy_row(last, row)
            self._codes[row] = self._codes[last]
        self._cache_rows.clear(last)

    @torch.inference_mode()
    def step_backbone(self) -> None:
        """From every row's last frame to its next hidden state."""
        if self.members:
            self._run(self._run_backbone, len(self.members))

    @torch.inference_mode()
    def draw_frames(self) -> Frames:
        """From every row's hidden state to its next frame.

        On a GPU this returns before the frame is there, and the next may be begun meanwhile.
        """
        rows = len(self.members)
        self._run(self._run_draw, rows)
        codes, audio = (
            tensor[:rows].to("cpu", non_blocking=True, copy=True)
            for tensor in (self._codes, self._audio)
        )
        copied = None
        if self.model.device.type == "cuda":
            copied = torch.cuda.Event()
            copied.record()
        return Frames(codes, audio, copied)

    def _run(self, function: Callable[[int], None], rows: int) -> None:
        if self._graphs is None:
            function(rows)
        else:
            self._graphs(function, rows)

    def _alternatives(self) -> list[Alternative]:
        """Of a GPU. Rows not in use are greedy: their codes depend on their hidden states alone."""
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
                "persistent depth decoder",
                self._run_draw,
                partial(self._run_draw, persistent=True),
                prepare,
                lambda rows: self._codes[:rows],
                PERSISTENT_ROWS,
            )
        ]

    def _run_backbone(self, rows: int) -> None:
        frames, mask = self.model.next_inputs(self._codes[:rows])
        batch = self._cache_rows.batch(rows)
        self._hidden[:rows] = self.model.backbone_step(frames, mask, batch, self.cache)
        self._cache_rows.advance(rows)

    def _run_draw(self, rows: int, persistent: bool = False) -> None:
        sampling = self._sampling.first(rows)
        codes = self.model.draw_frames(self._hidden[:rows], sampling, persistent)
        sampling.advance(codes[:, 0])
        self._codes[:rows] = codes
        self._audio[:rows] = self.mimi.decode_step(codes[:, None], self._streams.first(rows))
