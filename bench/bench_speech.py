"""Speech of full-size CSM-1B through the engine, as the server runs it: frames, sampling, codec.

Random weights, a prompt of 128 text tokens, default sampling. A step makes one frame of each of
`batch` requests, from codes to samples; the first step, with the prompt, is not counted. On a CPU,
precisions take turns of a few steps, so that a slow minute of the machine affects all of them; on a
GPU they run one after the other, since their KV caches would not fit side by side. `% roofline` is
the time to read the transformers' weights, and nothing else, from memory over the time taken;
`streams` is the number of real-time streams that steps of this batch size sustain. Run it with
`OMP_WAIT_POLICY=PASSIVE`, which `launch` and `say` set by themselves.
"""

import statistics
import time

import torch
from bench_codec import our_codecs, random_model
from bench_frame import PRECISIONS, our_model
from csm_1b_shapes import CACHED, FRAME_MS
from report import Report
from timing import CpuTimer, GpuTimer

from vox_serve.engine import Engine, Prompt, Request
from vox_serve.frame_bytes import frame_bytes
from vox_serve.loading import codec_precision
from vox_serve.mimi import Mimi
from vox_serve.model import CsmModel
from vox_serve.model_config import CsmConfig

TURNS, TURN_STEPS = 20, 3
GPU_TURNS, GPU_TURN_STEPS = 6, 10
"""More steps per turn on a GPU: the first step of a turn only collects a frame that the previous
turn started."""


class OurSpeech:
    """An engine with `batch` active requests."""

    def __init__(self, model: CsmModel, codec: Mimi, batch: int):
        config = model.config
        self.bytes = frame_bytes(model.weights).total
        self.batch = batch
        self.engine = Engine(model, codec, prompts=None, max_batch_size=batch)
        for _ in range(batch):  # each with its own prompt, or they would share their pages
            tokens = torch.zeros(CACHED, config.num_codebooks + 1, dtype=torch.int64)
            tokens[:, -1] = torch.randint(1, config.text_vocab_size, (CACHED,))
            self.engine.add(Request(""), Prompt.build(tokens, tokens > 0))
        while len(self.engine.step()) < batch:
            pass

    def step_ms(self) -> float:
        start = time.perf_counter()
        self.engine.step()
        return (time.perf_counter() - start) * 1e3


def run(
    report: Report,
    timer: CpuTimer | GpuTimer,
    config: CsmConfig,
    precisions: list[str],
    batches: list[int],
) -> None:
    table = report.table(
        "speech",
        [
            *("precision", "batch", "ms", "ms least", "ms most", "GB read", "% roofline"),
            *("real-time factor", "streams"),
        ],
    )
    codec_of = {p: codec_precision(timer.device, *PRECISIONS[p]) for p in precisions}
    codecs = our_codecs(random_model(), sorted({*codec_of.values()}), timer.device)
    on_gpu = isinstance(timer, GpuTimer)
    turns, steps = (min(timer.rounds, GPU_TURNS), GPU_TURN_STEPS) if on_gpu else (TURNS, TURN_STEPS)
    for side_by_side in [[p] for p in precisions] if on_gpu else [precisions]:
        models = {p: our_model(config, p, timer.device) for p in side_by_side}
        for batch in batches:
            speech: dict[str, OurSpeech] = {}
            for p in side_by_side:
                speech[p] = OurSpeech(models[p], codecs[codec_of[p]], batch)
            times: dict[str, list[float]] = {p: [] for p in speech}
            bandwidths: list[float] = []
            for _ in range(turns):
                bandwidths.append(timer.bandwidth())
                for precision, ours in speech.items():
                    times[precision] += [ours.step_ms() for _ in range(steps)]
            bytes_per_ms = statistics.median(bandwidths) / 1e3
            for precision, ours in speech.items():
                ms = statistics.median(times[precision])
                table.add(
                    *(precision, batch, ms, min(times[precision]), max(times[precision])),
                    *(ours.bytes / 1e9, 100 * ours.bytes / bytes_per_ms / ms),
                    *(ms / FRAME_MS, FRAME_MS / ms * batch),
                )
            ours = None
