"""A plain torch reference of MisoTTS, for small models of its shape.

It follows the model's public definition: two Llama transformers with rotary pairs in adjacent rows,
prompts written `[0] text`. Every step recomputes the whole sequence, without a cache.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from checkpoints import TinyCsm, TinyShape, original_tensors

SHAPE = TinyShape(
    num_codebooks=8,
    layers=4,
    dim=128,
    heads=8,
    kv_heads=2,
    head_dim=16,
    ffn=448,
    depth_layers=3,
    depth_dim=192,
    depth_heads=12,
    depth_kv_heads=3,
    depth_head_dim=16,
    depth_ffn=864,
    depth_norm_eps=1e-5,
)
"""MisoTTS 8B's proportions: four query heads to a key head, MLPs 3.5 and 4.5 times as wide as the
model, heads that are together as wide as the model."""


def settings(tiny: TinyCsm) -> dict:
    """config.json of a small model, with the keys of the conversions for MLX."""
    s = tiny.shape
    return {
        "model_type": "miso_tts",
        "backbone_flavor": "llama-8B",
        "decoder_flavor": "llama-300M",
        "text_vocab_size": tiny.tokenizer.get_vocab_size(),
        "audio_vocab_size": s.audio_vocab_size,
        "audio_num_codebooks": s.num_codebooks,
        "vocab_size": tiny.tokenizer.get_vocab_size(),
        "max_position_embeddings": s.max_positions,
        **flavor(s.layers, s.dim, s.heads, s.kv_heads, s.ffn),
        "depth_decoder_config": {
            "vocab_size": tiny.tokenizer.get_vocab_size(),
            **flavor(s.depth_layers, s.depth_dim, s.depth_heads, s.depth_kv_heads, s.depth_ffn),
        },
    }


def flavor(layers: int, dim: int, heads: int, kv_heads: int, ffn: int) -> dict[str, int]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": dim,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": ffn,
    }


@dataclass(frozen=True)
class MisoReference:
    """Greedy generation with a tiny model's weights, in the original's names and row order."""

    tiny: TinyCsm

    @property
    def tensors(self) -> dict[str, Tensor]:
        csm = {n: t for n, t in self.tiny.tensors.items() if not n.startswith("codec_model.")}
        return original_tensors(csm, self.tiny.shape)

    @torch.no_grad()
    def generate(self, segments, num_frames: int) -> Tensor:
        """Codes `[N, K]` for segments with `speaker, text, codes`; the last one is spoken."""
        t, s = self.tensors, self.tiny.shape
        offsets = torch.arange(s.num_codebooks) * s.audio_vocab_size
        rows = []
        for segment in segments:
            rows.append(t["text_embeddings.weight"][self._tokens(segment.speaker, segment.text)])
            if segment.codes is not None:
                end = torch.zeros(1, s.num_codebooks, dtype=torch.int64)
                codes = torch.cat([segment.codes, end])
                rows.append(t["audio_embeddings.weight"][codes + offsets].sum(1))
        x, frames = torch.cat(rows), []
        for _ in range(num_frames):
            hidden = self._transformer("backbone", x, s.layers, s.heads, s.kv_heads, s.head_dim)
            frame = self._frame(t, hidden[-1], offsets)
            if not frame.any():
                break
            frames.append(frame)
            x = torch.cat([x, t["audio_embeddings.weight"][frame + offsets].sum(0)[None]])
        return torch.stack(frames)

    def _tokens(self, speaker: int, text: str) -> list[int]:
        tokenizer = self.tiny.tokenizer
        tokenizer.encode_special_tokens = True
        ids = tokenizer.encode(f"[{speaker}] {text.lstrip()}", add_special_tokens=False).ids
        begin, end = (tokenizer.token_to_id(f"<|{n}_of_text|>") for n in ("begin", "end"))
        return [begin, *ids, end]

    def _frame(self, t: dict[str, Tensor], hidden: Tensor, offsets: Tensor) -> Tensor:
        s = self.tiny.shape
        codes = [int((t["codebook0_head.weight"] @ hidden).argmax())]
        inputs = hidden[None]
        for k in range(1, s.num_codebooks):
            row = t["audio_embeddings.weight"][codes[-1] + offsets[k - 1]]
            inputs = torch.cat([inputs, row[None]])
            sizes = (s.depth_layers, s.depth_heads, s.depth_kv_heads, s.depth_head_dim)
            out = self._transformer("decoder", inputs @ t["projection.weight"].T, *sizes)
            codes.append(int((out[-1] @ t["audio_head"][k - 1]).argmax()))
        return torch.tensor(codes)

    def _transformer(
        self, part: str, x: Tensor, layers: int, heads: int, kv_heads: int, head_dim: int
    ) -> Tensor:
        t = self.tensors
        mask = torch.full((len(x), len(x)), -math.inf).triu(1)
        for i in range(layers):
            w = {n.removeprefix(f"{part}.layers.{i}."): v for n, v in t.items()}
            y = _norm(x, w["sa_norm.scale"])
            q, k, v = (
                (y @ w[f"attn.{name}_proj.weight"].T).view(len(x), -1, head_dim) for name in "qkv"
            )
            q, k = _rotated(q), _rotated(k)
            k, v = (a.repeat_interleave(heads // kv_heads, dim=1) for a in (k, v))
            scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(head_dim) + mask
            y = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1)
            x = x + y @ w["attn.output_proj.weight"].T
            y = _norm(x, w["mlp_norm.scale"])
            gate = torch.nn.functional.silu(y @ w["mlp.w1.weight"].T)
            x = x + (gate * (y @ w["mlp.w3.weight"].T)) @ w["mlp.w2.weight"].T
        return _norm(x, t[f"{part}.norm.scale"])


def _norm(x: Tensor, scale: Tensor, eps: float = 1e-5) -> Tensor:
    return x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt() * scale


def _rotated(x: Tensor) -> Tensor:
    """Rotate the pairs of adjacent channels of `[T, H, D]`, with Llama 3's scaled frequencies."""
    width = x.shape[-1]
    frequencies = 500_000.0 ** (-torch.arange(0, width, 2) / width)
    scaled = []
    for frequency in frequencies.tolist():
        wavelength = 2 * math.pi / frequency
        share = min(1.0, max(0.0, (8192 / wavelength - 1) / (4 - 1)))
        scaled.append((1 - share) * frequency / 32 + share * frequency)
    angles = torch.arange(len(x))[:, None] * torch.tensor(scaled)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    even, odd = x[..., ::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)
