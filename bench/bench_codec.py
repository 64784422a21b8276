"""One streamed frame of full-size Mimi per stream: 32 codes to 1,920 samples.

Random weights, a full key window. A gigabyte is read between frames, as CSM's transformers would,
so nothing stays in a cache; this read also measures the bandwidth. The peer is transformers'
`MimiModel.decode` with its transformer's KV cache, on the same weights in float32. It keeps no
state of its convolutions, so its samples differ from those of whole-stream decoding; the amount of
work is the same.

`floor ms`: sum over the layers of bytes over the read bandwidth or operations over the multiply-add
rate, whichever is longer for that layer.
"""

import statistics
import tempfile
import time
from dataclasses import dataclass

import roofline
import torch
from csm_1b_shapes import FRAME_MS
from report import Report
from transformers import MimiConfig, MimiModel
from transformers.cache_utils import DynamicCache
from transformers.utils.logging import disable_progress_bar

from vox_serve.frame_bytes import num_tensor_bytes
from vox_serve.mimi import Mimi, load_mimi

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.bfloat16}
"""Precision of the codec's matrices, and the dtype of most of its operations."""
WINDOW_FRAMES = 125


@dataclass(frozen=True)
class Layer:
    """The least work of a layer for one frame of each stream."""

    num_bytes: int
    operations: int

    def floor_ms(self, bytes_per_s: float, operations_per_s: float) -> float:
        return 1e3 * max(self.num_bytes / bytes_per_s, self.operations / operations_per_s)


def layers(mimi: Mimi, batch: int) -> list[Layer]:
    """The transformer (matrices and all keys and values) as one layer, then every convolution."""
    decoder, config = mimi.decoder, mimi.config
    steps = batch * config.latent_stride
    heads, past_keys = config.num_key_value_heads, config.sliding_window - 1
    kv_bytes = 2 * 4 * config.num_hidden_layers * batch * heads * past_keys * config.head_dim
    width, rows = config.hidden_size, (config.num_attention_heads + heads) * 2 * config.head_dim
    weights = config.num_hidden_layers * width * (rows + 2 * config.intermediate_size)
    result = [Layer(num_tensor_bytes(decoder.transformer.weights) + kv_bytes, 2 * steps * weights)]

    for conv in decoder.convs.convs:
        taps = conv.context // conv.dilation + 1
        operations = 2 * steps * len(conv.bias) * taps * conv.width
        result.append(Layer(num_tensor_bytes([conv.weight]), operations))
        steps *= conv.block_out
    return result


class OurStreams:
    """Decodes frame after frame of `batch` streams."""

    def __init__(self, mimi: Mimi, batch: int):
        self.mimi, self.batch = mimi, batch
        codes = torch.randint(0, 2048, (batch, WINDOW_FRAMES, 32))
        self.state = mimi.init_state(batch)
        mimi.decode_step(codes, self.state)

    def frame_ms(self) -> float:
        codes = torch.randint(0, 2048, (self.batch, 1, 32))
        start = time.perf_counter()
        self.mimi.decode_step(codes, self.state)
        return (time.perf_counter() - start) * 1e3


class TransformersStreams:
    """Decodes frame after frame of `batch` streams with transformers' model."""

    def __init__(self, model: MimiModel, batch: int):
        self.model, self.batch = model, batch
        self.cache = DynamicCache(config=model.config)
        self._decode(torch.randint(0, 2048, (batch, 32, WINDOW_FRAMES)))

    def frame_ms(self) -> float:
        codes = torch.randint(0, 2048, (self.batch, 32, 1))
        start = time.perf_counter()
        self._decode(codes)
        return (time.perf_counter() - start) * 1e3

    def _decode(self, codes: torch.Tensor) -> None:
        self.model.decode(codes, decoder_past_key_values=self.cache)


def random_model() -> MimiModel:
    """transformers' model at full size, with random weights."""
    model = MimiModel(MimiConfig()).eval()
    for name, buffer in model.named_buffers():
        if name.endswith("embed_sum"):
            buffer.normal_()
        elif name.endswith("cluster_usage"):
            buffer.fill_(1.0)
    return model


def our_codecs(model: MimiModel, precisions: list[str], device: str = "cpu") -> dict[str, Mimi]:
    """Our codec with the same weights, at each precision."""
    disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return {name: load_mimi(folder, name, device) for name in precisions}


def run(report: Report, precisions: list[str], batches: list[int], peer: bool) -> None:
    table = report.table(
        "codec",
        [
            *("precision", "batch", "ms", "MB read", "Gop", "floor ms", "% roofline"),
            *("real-time factor", "transformers ms", "x transformers"),
        ],
    )
    model = random_model()
    codecs = our_codecs(model, precisions)
    for batch in batches:
        streams = {name: OurStreams(mimi, batch) for name, mimi in codecs.items()}
        if peer:
            streams["transformers"] = TransformersStreams(model, batch)
        times: dict[str, list[float]] = {name: [] for name in streams}
        bandwidths: dict[str, list[float]] = {name: [] for name in streams}
        rates = {
            dtype: roofline.median_of(roofline.multiply_rate, 3, dtype)
            for dtype in {PRECISIONS[name] for name in precisions}
        }
        for turn in range(28):
            for name, stream in streams.items():
                bandwidth = roofline.read_bandwidth()
                ms = stream.frame_ms()
                if turn >= 3:
                    times[name].append(ms)
                    bandwidths[name].append(bandwidth)
        their_ms = statistics.median(times["transformers"]) if peer else None
        for name, mimi in codecs.items():
            work = layers(mimi, batch)
            bandwidth, rate = statistics.median(bandwidths[name]), rates[PRECISIONS[name]]
            floor_ms = sum(layer.floor_ms(bandwidth, rate) for layer in work)
            ms = statistics.median(times[name])
            table.add(
                *(name, batch, ms, sum(layer.num_bytes for layer in work) / 1e6),
                *(sum(layer.operations for layer in work) / 1e9, floor_ms, 100 * floor_ms / ms),
                *(ms / FRAME_MS, their_ms, their_ms and their_ms / ms),
            )
