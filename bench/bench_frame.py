"""A whole frame of a full-size model: backbone step, codebook 0, depth decoder, KV append.

Random weights of the real sizes, greedy sampling, 128 cached positions. Timed from one frame's
codes to the next frame's, as in a public megakernel benchmark for this model. On a GPU the frame is
one CUDA graph on static buffers, replayed. The peer of CSM-1B is transformers'
`CsmForConditionalGeneration.generate` on the same weights: milliseconds from one backbone step to
the next, without the prompt. If ours are packed, the peer has bfloat16 weights; on a GPU it runs at
batches up to 8. `bench/run.py peers` has more programs. Our backends take turns on the same
tensors; `persistent` is the native backend with the depth decoder as one kernel, up to the number
of rows that this kernel supports.

`% roofline` is the time floor over the time taken. The floor is the longer of two times: to read
weights and cached keys and values from memory once per use, and to do the multiply-adds. `% past
cache` counts only those bytes that a cache as large as the last-level one could not have kept from
one step of the depth decoder to the next. `streams` is the number of real-time streams that frames
of this batch size sustain.

The table `bytes` measures nothing: `GB/s real time` is the read bandwidth that one real-time stream
needs, if every weight is read from memory each time that it is used.
"""

import statistics
from collections.abc import Callable, Sequence
from functools import partial

import torch
from bench_backends import PERSISTENT, bind_backend, comparison_cells, comparison_columns
from csm_1b_shapes import CACHED, FRAME_MS, weight_bytes
from machine import last_cache_bytes
from report import Report
from timing import CpuTimer, GpuTimer

from vox_serve.csm_weights import CsmWeights
from vox_serve.frame_bytes import frame_bytes
from vox_serve.kv_cache import CacheBatch, CacheSequence, KvCache
from vox_serve.memory import memory_bytes
from vox_serve.model import PERSISTENT_ROWS, CsmModel
from vox_serve.model_config import CsmConfig
from vox_serve.sampling import SamplingParams, SamplingRows
from voxkern.backend import backend_for

PRECISIONS = {
    "float32": (torch.float32, "none"),
    "bfloat16": (torch.bfloat16, "none"),
    "int8": (torch.bfloat16, "int8"),
    "int4": (torch.bfloat16, "int4"),
}
"""Dtype, and the packing of matrices (`quantize` of `CsmWeights`)."""
MEMORY_SHARE = 0.7  # of the machine, that a model's weights may take
MAX_PEER_BATCH = {"cpu": 1 << 30, "cuda": 8}


class OurFrames:
    """Generates frames for `batch` sequences, always the one after `CACHED` positions, on each of
    several backends; None is the default choice."""

    def __init__(
        self,
        model: CsmModel,
        batch: int,
        timer: CpuTimer | GpuTimer | None = None,
        backends: Sequence[str | None] = (None,),
    ):
        self.model = model
        self.cache = KvCache(model.config.backbone, batch, model.dtype, model.device)
        self.cache.k_pages.normal_()
        self.cache.v_pages.normal_()
        sequences = [CacheSequence() for _ in range(batch)]
        for sequence in sequences:
            self.cache.extend(sequence, CACHED)
        self.slots = CacheBatch.decode(self.cache, sequences)
        shape, vocab = (batch, model.config.num_codebooks), model.config.audio_vocab_size
        self.codes = torch.randint(0, vocab - 3, shape, device=model.device)
        greedy = [SamplingParams(temperature=0)] * batch
        self.rows = SamplingRows.of(greedy, [0] * batch, model.device)
        self._timer, self._backends = timer or CpuTimer(), backends
        self._measures: dict[int, Callable[[], float]] = {}

    def frames_ms(self, frames: int, backend: int = 0) -> list[float]:
        """Milliseconds of each of `frames` frames on the backend with that index.

        Raises:
            RuntimeError: the depth decoder's watchdog ended a frame.
        """
        if backend not in self._measures:
            call = bind_backend(self._backends[backend], self.frame)
            self._measures[backend] = self._timer.prepare(call, [()], calls=1)
        times = [self._measures[backend]() for _ in range(frames)]
        if bool((self.codes < 0).any()):
            self.codes.clamp_(min=0)
            raise RuntimeError("decode_depth's watchdog ended a frame")
        return times

    def frame(self, persistent: bool = False) -> None:
        """Replaces `codes` with the next frame's codes."""
        frames, mask = self.model.next_inputs(self.codes)
        hidden = self.model.backbone_step(frames, mask, self.slots, self.cache)
        self.codes.copy_(self.model.draw_frames(hidden, self.rows, persistent))


def our_model(config: CsmConfig, precision: str, device: str = "cpu") -> CsmModel:
    """A model with random weights."""
    dtype, quantize = PRECISIONS[precision]
    return CsmModel(config, CsmWeights.random(config, dtype, device=device, quantize=quantize))


def cached_bytes(config: CsmConfig, dtype: torch.dtype, batch: int) -> int:
    """Bytes of cached keys and values that a frame reads in the backbone."""
    c = config.backbone
    return 2 * batch * (CACHED + 1) * c.num_layers * c.num_kv_heads * c.head_dim * dtype.itemsize


def run(
    report: Report,
    timer: CpuTimer | GpuTimer,
    config: CsmConfig,
    precisions: list[str],
    batches: list[int],
    peer: bool,
    backends: Sequence[str | None] = (None,),
) -> None:
    add_bytes(report, config, timer.device)
    table = report.table(
        "frame",
        [
            *("precision", "batch", "backend", "ms", "GB read", "% roofline", "% past cache"),
            *("real-time factor", "streams"),
            *comparison_columns([*backends, "transformers"]),
        ],
    )
    for precision in precisions:
        needed = weight_bytes(config, *PRECISIONS[precision])
        if timer.device == "cpu" and needed > MEMORY_SHARE * memory_bytes():
            report.leave_out(precision, f"its weights take {needed / 1e9:.1f} GB")
            continue
        model = our_model(config, precision, timer.device)
        read = frame_bytes(model.weights)
        dtype, quantize = PRECISIONS[precision]
        plain = frame_bytes(CsmWeights.empty(config, dtype, "meta")).total
        rate = timer.rate(dtype if quantize == "none" else torch.int8)
        theirs = None
        for batch in batches:
            if peer and batch <= MAX_PEER_BATCH[timer.device]:
                theirs = their_frames(report, config, model.weights, precision, batch, timer.device)
            else:
                theirs = None
            ours = OurFrames(model, batch, timer, backends)
            frame_timers: dict[str | None, Callable[[int], list[float]]] = {
                name: partial(ours.frames_ms, backend=i)
                for i, name in enumerate(backends)
                if name != PERSISTENT or batch <= PERSISTENT_ROWS
            }
            if theirs:
                frame_timers["transformers"] = theirs.frames_ms
            context = f"beside {precision} at batch {batch}"
            found, bandwidth = take_turns(report, timer, frame_timers, context)
            medians = [found.get(name) for name in (*backends, "transformers")]
            ms = medians[0]
            bytes_per_ms = bandwidth / 1e3
            cached = cached_bytes(config, dtype, batch)
            arithmetic_ms = 2e3 * batch * plain / dtype.itemsize / rate
            floors = [
                max((num_bytes + cached) / bytes_per_ms, arithmetic_ms)
                for num_bytes in (read.total, read.from_memory(last_cache_bytes(timer.device)))
            ]
            table.add(
                *(precision, batch, backends[0] or backend_for(timer.device), ms),
                (read.total + cached) / 1e9,
                *(100 * floor / ms for floor in floors),
                *(ms / FRAME_MS, FRAME_MS / ms * batch),
                *comparison_cells(medians),
            )
            ours = frame_timers = None
        del model, theirs


def add_bytes(report: Report, config: CsmConfig, device: str) -> None:
    """Add the table of bytes: what the weights take, and what a frame at batch 1 reads."""
    table = report.table(
        "bytes", ["precision", "GB of weights", "GB a frame", "GB past cache", "GB/s real time"]
    )
    for precision, (dtype, quantize) in PRECISIONS.items():
        read = frame_bytes(CsmWeights.empty(config, dtype, "meta", quantize))
        table.add(
            precision,
            weight_bytes(config, dtype, quantize) / 1e9,
            read.total / 1e9,
            read.from_memory(last_cache_bytes(device)) / 1e9,
            read.total / 1e6 / FRAME_MS,
        )


def take_turns(
    report: Report,
    timer: CpuTimer | GpuTimer,
    frame_timers: dict[str | None, Callable[[int], list[float]]],
    context: str,
) -> tuple[dict[str | None, float], float]:
    """Times all programs in turn: median milliseconds per frame of each, and bytes per second. If
    one other than the first raises, it is skipped: a broken peer must not cost us our own figure.

    Args:
        frame_timers: for each program, a function from a number of frames to their milliseconds.
        context: added to the report of a skipped program.
    """
    first = next(iter(frame_timers))
    times: dict[str | None, list[float]] = {name: [] for name in frame_timers}
    bandwidths: list[float] = []
    for warm in (False, True, True, True):
        for name in list(times):
            try:
                seen = frame_timers[name](4)
            except Exception as error:
                if name == first:
                    raise
                report.leave_out(f"{name} {context}", error)
                del times[name]
            else:
                times[name] += seen if warm else []
        if warm:
            bandwidths += [timer.bandwidth() for _ in range(3)]
    medians = {name: statistics.median(seen) for name, seen in times.items()}
    return medians, statistics.median(bandwidths)


def their_frames(
    report: Report,
    config: CsmConfig,
    weights: CsmWeights,
    precision: str,
    batch: int,
    device: str,
):
    """transformers' frames; None, and reported, if they cannot be made."""
    dtype, quantize = PRECISIONS[precision]
    try:
        from transformers_frames import TransformersFrames

        if quantize != "none":
            weights = CsmWeights.random(config, dtype, device=device)
        with torch.device(device):
            return TransformersFrames(config, weights, batch)
    except Exception as error:  # transformers is missing, or an unsupported version
        report.leave_out(f"transformers at batch {batch}", error)
        return None
