"""A whole frame of full-size CSM-1B: backbone step, codebook 0, depth decode, KV rows written.

Random weights of the real sizes, greedy, 128 cached positions, from a frame's codes to the next
frame's. The peer is transformers' `CsmForConditionalGeneration.generate` on the very same weights:
milliseconds from one backbone step to the next, the prompt's left out. Beside packed weights it has
bfloat16 ones. `bench/run.py peers` has more programs.

`% roofline` counts every byte as read from memory; `% past L3` only those that no cache of the
size of the last one could have kept from one step of the depth decoder to the next.
"""

import statistics
import time

import roofline
import torch
from csm_1b import CACHED, CSM_1B, FRAME_MS, frame_bytes
from machine import cache_bytes
from report import Report

from vox_serve.csm_weights import CsmWeights
from vox_serve.kv_cache import CacheBatch, CacheSequence, KvCache
from vox_serve.model import CsmModel
from vox_serve.model_config import CsmConfig
from vox_serve.sampling import SamplingParams, SamplingRows

PRECISIONS = {
    "float32": (torch.float32, "none"),
    "bfloat16": (torch.bfloat16, "none"),
    "int8": (torch.bfloat16, "int8"),
    "int4": (torch.bfloat16, "int4"),
}
"""Dtype, and how matrices are packed: `CsmWeights`' `quantize`."""


class OurFrames:
    """Frame after frame for `batch` sequences, each from `CACHED` positions on."""

    def __init__(self, model: CsmModel, batch: int):
        self.model, self.batch = model, batch
        self.cache = KvCache(model.config.backbone, batch, model.dtype, model.device)
        self.cache.k_pages.normal_()
        self.cache.v_pages.normal_()
        self.sequences = [CacheSequence() for _ in range(batch)]
        self.codes = torch.randint(0, 2048, (batch, model.config.num_codebooks))
        greedy = [SamplingParams(temperature=0)] * batch
        self.rows = SamplingRows.of(greedy, [0] * batch, model.device)

    def frames_ms(self, frames: int) -> list[float]:
        return [self._frame_ms() for _ in range(frames)]

    def _frame_ms(self) -> float:
        for sequence in self.sequences:
            self.cache.release(sequence)
            self.cache.extend(sequence, CACHED)
        start = time.perf_counter()
        frames, mask = self.model.next_inputs(self.codes)
        batch = CacheBatch.decode(self.cache, self.sequences)
        hidden = self.model.backbone_step(frames, mask, batch, self.cache)
        self.codes = self.model.draw_frames(hidden, self.rows)
        return (time.perf_counter() - start) * 1e3


def our_model(config: CsmConfig, precision: str) -> CsmModel:
    """A model with random weights."""
    dtype, quantize = PRECISIONS[precision]
    return CsmModel(config, CsmWeights.random(config, dtype, quantize=quantize))


def run(report: Report, precisions: list[str], batches: list[int], peer: bool) -> None:
    table = report.table(
        "frame",
        [
            *("precision", "batch", "ms", "GB read", "% roofline", "% past L3"),
            *("real-time factor", "frames/s", "transformers ms", "x transformers"),
        ],
    )
    config = CsmConfig.from_json(CSM_1B)
    for precision in precisions:
        model = our_model(config, precision)
        read = frame_bytes(model.weights)
        dtype, quantize = PRECISIONS[precision]
        plain = model.weights
        if peer and quantize != "none":
            plain = CsmWeights.random(config, dtype)
        for batch in batches:
            ours = OurFrames(model, batch)
            theirs = None
            if peer:
                from transformers_frames import TransformersFrames

                theirs = TransformersFrames(config, plain, batch)
            times: dict[str, list[float]] = {"ours": [], "theirs": [], "bandwidth": []}
            for warm in (False, True, True, True):
                ms = ours.frames_ms(4)
                their_ms = theirs.frames_ms(4) if theirs else []
                if warm:
                    times["ours"] += ms
                    times["theirs"] += their_ms
                    times["bandwidth"] += [roofline.read_bandwidth() for _ in range(3)]
            ms = statistics.median(times["ours"])
            bytes_per_ms = statistics.median(times["bandwidth"]) / 1e3
            past_l3 = read.from_memory(cache_bytes(3))
            their_ms = statistics.median(times["theirs"]) if theirs else None
            table.add(
                *(precision, batch, ms, read.total / 1e9),
                *(100 * num_bytes / bytes_per_ms / ms for num_bytes in (read.total, past_l3)),
                *(ms / FRAME_MS, 1e3 * batch / ms),
                *(their_ms, their_ms and their_ms / ms),
            )
        del model, plain, ours, theirs
