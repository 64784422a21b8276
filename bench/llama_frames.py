"""Frames of llama.cpp: a backbone token, then 31 depth tokens, on GGUF files of CSM-1B's shapes.

llama.cpp does not support CSM, so a frame is the cost of its two transformers: random weights, one
head for all codebooks (it may stay in a cache), no projection between the two, no sampling. Each of
these favours llama.cpp.
"""

import ctypes
import time
from collections.abc import Iterator
from math import prod
from pathlib import Path

from csm_1b_shapes import CACHED

from vox_serve.frame_bytes import FrameBytes
from vox_serve.model_config import CsmConfig, TransformerConfig

FORMATS = {"bfloat16": "BF16", "int8": "Q8_0", "int4": "Q4_0"}
BITS = {"BF16": 16, "Q8_0": 8.5, "Q4_0": 4.5}
HEAD_ROWS = 2064
"""2051 rounded up to a multiple of 16: Q4_0 has its fastest kernel only for multiples of 8."""


def gguf_shapes(part: TransformerConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """llama.cpp's tensor names, with shapes, of one transformer with its own head."""
    width, keys = part.num_heads * part.head_dim, part.num_kv_heads * part.head_dim
    yield "token_embd.weight", (HEAD_ROWS, part.dim)
    for i in range(part.num_layers):
        yield f"blk.{i}.attn_norm.weight", (part.dim,)
        yield f"blk.{i}.attn_q.weight", (width, part.dim)
        yield f"blk.{i}.attn_k.weight", (keys, part.dim)
        yield f"blk.{i}.attn_v.weight", (keys, part.dim)
        yield f"blk.{i}.attn_output.weight", (part.dim, width)
        yield f"blk.{i}.ffn_norm.weight", (part.dim,)
        yield f"blk.{i}.ffn_gate.weight", (part.ffn_dim, part.dim)
        yield f"blk.{i}.ffn_up.weight", (part.ffn_dim, part.dim)
        yield f"blk.{i}.ffn_down.weight", (part.dim, part.ffn_dim)
    yield "output_norm.weight", (part.dim,)
    yield "output.weight", (HEAD_ROWS, part.dim)


def token_bytes(part: TransformerConfig, gguf_format: str) -> int:
    """Weight bytes read for one token: matrices in the format, norms in float32."""
    return sum(
        prod(shape) * 4 if len(shape) == 1 else int(prod(shape) * BITS[gguf_format]) // 8
        for name, shape in gguf_shapes(part)
        if name != "token_embd.weight"
    )


def llama_frame_bytes(config: CsmConfig, gguf_format: str) -> FrameBytes:
    backbone, depth = (token_bytes(part, gguf_format) for part in (config.backbone, config.depth))
    return FrameBytes(backbone, depth, config.num_codebooks - 1)


def write_gguf(path: Path, part: TransformerConfig, gguf_format: str) -> None:
    """Writes a file that llama.cpp loads as a Llama without a tokenizer; keeps an existing file."""
    import gguf
    import numpy as np

    if path.exists():
        return
    unfinished = path.with_suffix(".unfinished")
    writer = gguf.GGUFWriter(unfinished, "llama")
    writer.add_context_length(part.max_positions)
    writer.add_embedding_length(part.dim)
    writer.add_block_count(part.num_layers)
    writer.add_feed_forward_length(part.ffn_dim)
    writer.add_head_count(part.num_heads)
    writer.add_head_count_kv(part.num_kv_heads)
    writer.add_key_length(part.head_dim)
    writer.add_value_length(part.head_dim)
    writer.add_rope_dimension_count(part.head_dim)
    writer.add_rope_freq_base(part.rope_theta)
    writer.add_layer_norm_rms_eps(part.norm_eps)
    writer.add_vocab_size(HEAD_ROWS)
    writer.add_tokenizer_model("none")
    kind = gguf.GGMLQuantizationType[gguf_format]
    random = np.random.default_rng(0)
    # Layers share their values, but not their storage in the file: numpy quantizes slowly.
    made: dict[tuple[int, ...], np.ndarray] = {}
    for name, shape in gguf_shapes(part):
        if len(shape) == 1:
            writer.add_tensor(name, np.ones(shape, np.float32))
            continue
        if shape not in made:
            values = random.standard_normal(shape, np.float32) * shape[1] ** -0.5
            made[shape] = gguf.quants.quantize(values, kind)
        writer.add_tensor(name, made[shape], raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    unfinished.rename(path)


class _Context:
    """One model with its KV cache."""

    def __init__(self, path: Path, positions: int, threads: int):
        import llama_cpp

        self.api = llama_cpp
        # Not mapped from the file: the system may evict its pages.
        settings = llama_cpp.llama_model_default_params()
        settings.load_mode = llama_cpp.LLAMA_LOAD_MODE_NONE
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), settings)
        if not self.model:
            raise RuntimeError(f"llama.cpp does not load {path}")
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = positions
        settings.n_threads = settings.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, settings)
        if not self.context:
            raise RuntimeError(f"llama.cpp makes no context of {positions} positions for {path}")
        self.cache = llama_cpp.llama_get_memory(self.context)

    def forget_from(self, position: int) -> None:
        self.api.llama_memory_seq_rm(self.cache, 0, position, -1)

    def run(self, *tokens: int) -> None:
        """Runs tokens at the next positions; the logits of the last are ready on return."""
        array = (ctypes.c_int32 * len(tokens))(*tokens)
        batch = self.api.llama_batch_get_one(array, len(tokens))
        if self.api.llama_decode(self.context, batch):
            raise RuntimeError("llama_decode failed")
        self.api.llama_synchronize(self.context)


class LlamaFrames:
    """Generates frames at batch 1, always the one after `CACHED` positions."""

    def __init__(self, config: CsmConfig, precision: str, folder: Path, threads: int):
        parts = {}
        for name, part in (("backbone", config.backbone), ("depth", config.depth)):
            path = folder / f"{name}-{FORMATS[precision]}.gguf"
            write_gguf(path, part, FORMATS[precision])
            parts[name] = _Context(path, 256 if name == "backbone" else 64, threads)
        self.backbone, self.depth = parts["backbone"], parts["depth"]
        self.steps = config.num_codebooks - 1
        self.backbone.run(*range(CACHED))

    def description(self) -> str:
        """The instruction sets that llama.cpp was built for."""
        return self.backbone.api.llama_print_system_info().decode()

    def frames_ms(self, frames: int) -> list[float]:
        return [self._frame_ms(frame) for frame in range(frames)]

    def _frame_ms(self, frame: int) -> float:
        self.backbone.forget_from(CACHED)
        self.depth.forget_from(0)
        start = time.perf_counter()
        self.backbone.run(frame)
        for step in range(self.steps):
            self.depth.run((61 * step + frame) % HEAD_ROWS)
        return (time.perf_counter() - start) * 1e3
