"""Step 11: let a voice that was trained on single utterances speak after others.

    python segment_layer.py CHECKPOINT OUT

Such a voice confuses the text to speak with those before it. This adds a layer whose weights are
computed, not trained. With it, attention cannot reach earlier segments: the voice speaks after any
context as it speaks alone. Distilling the same from the voice takes hours (LOG.md).

- The new first layer counts the stop frames before each position. One of its heads attends to all
  stop frames, to all beginnings of text, and to the position itself. So it sees m stop frames and
  m + 1 beginnings, with one weight each. The difference of the two sums is ONE, and the first sum
  is COUNT, m times as much.
- In all further layers, queries and keys get two more products, one_i * count_j - count_i * one_j.
  Within a segment they cancel. For a key of an earlier segment they are negative and large.

They cancel in float32, also with packed weights, but not in bfloat16: config.json says so.

The state gets DIMS more numbers: eight would do, but packed weights need groups of 32. A head
gets HEAD_DIMS more, in pairs that hardly rotate, and rope_theta becomes theta ** (80 / 64), with
which all old pairs keep their frequency. A voice without context stays the same to the rounding.
"""

import argparse
import json
import math
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

DIMS = 32
HEAD_DIMS = 16
LARGE, FILL, FILL_2, MARK, STOP, BEGIN, COUNT, ONE = range(8)
"""The new dimensions in use, after the old ones. Every embedding has LARGE, so that its norm is
constant, and two of the next five: a stop frame MARK and STOP, the beginning of a text MARK and
BEGIN, all others FILL and FILL_2."""
LARGE_VALUE = 8192.0
SMALL_VALUE = LARGE_VALUE / 4
NORM_SHARE = 8 / 9  # of LARGE in the square of a norm
AMPLITUDE = 0.03  # of COUNT and ONE before the head's weights: small against any state
COUNT_GAIN = 0.1965  # no count lies where its rounding to 8 bits could go both ways
MARK_WEIGHT = 1 / 32  # relative to the position's own
SELF_PAIRS = 8  # the fastest pairs, whose products tell a position from all others
SELF_WEIGHT = 4.0
GATE = 16.0  # silu(16) is 16
MAX_SEGMENTS = 24  # up to here the bias is at least MIN_BIAS
MIN_BIAS = 30.0
STATE_NORMS = (8.0, 1000.0)
"""Nearly the largest norm of a state: before the first of the old layers, before the others."""


def new_rows(old: int, new: int, heads: int) -> Tensor:
    """The rows of a projection whose heads grow from `old` to `new` numbers, in order: a head's
    first half stays at the start of the first half, its second half at that of the second."""
    half = old // 2
    one_head = torch.cat((torch.arange(half), new // 2 + torch.arange(half)))
    return (new * torch.arange(heads)[:, None] + one_head).flatten()


def padded(weight: Tensor, *shape: int) -> Tensor:
    """A tensor of that shape with the weight at its start, zeros elsewhere."""
    out = torch.zeros(*shape)
    out[tuple(slice(size) for size in weight.shape)] = weight
    return out


class Surgery:
    """The new tensors and settings of one checkpoint.

    Attributes:
        settings: of config.json, changed in place.
        dim: size of the old state.
    """

    def __init__(
        self, settings: dict, tensors: dict[str, Tensor], state_norms: tuple = STATE_NORMS
    ) -> None:
        self.settings, self.state_norms = settings, state_norms
        self.tensors = {name: tensor.float() for name, tensor in tensors.items()}
        self.dim, self.old_head = settings["hidden_size"], settings["head_dim"]
        self.heads, self.kv_heads = (
            settings[f"num_{kind}_heads"] for kind in ("attention", "key_value")
        )
        self.size, self.head = self.dim + DIMS, self.old_head + HEAD_DIMS
        self.layers, self.ffn = settings["num_hidden_layers"], settings["intermediate_size"]
        self.theta = settings["rope_parameters"]["rope_theta"] ** (self.head / self.old_head)

    def frequency(self, pair: int) -> float:
        return self.theta ** (-2 * pair / self.head)

    def run(self) -> None:
        """Changes settings and tensors."""
        if self.settings["rope_parameters"]["rope_type"] != "default":
            raise ValueError("only the default RoPE is supported")
        layers = [self.old_layer(number) for number in range(self.layers)]
        self.widen_ends()
        for number, layer in enumerate([self.counting_layer(), *layers]):
            for name, tensor in layer.items():
                self.tensors[f"backbone_model.layers.{number}.{name}.weight"] = tensor
        shrink = self.dim / self.size
        self.settings.update(
            hidden_size=self.size,
            head_dim=self.head,
            num_hidden_layers=self.layers + 1,
            rms_norm_eps=self.settings["rms_norm_eps"] * shrink,  # a mean over more numbers
            rope_parameters={"rope_theta": self.theta, "rope_type": "default"},
            follows_context=True,
            context_needs_float32=True,
        )
        self.settings["depth_decoder_config"]["backbone_hidden_size"] = self.size

    def widen_ends(self) -> None:
        """Embeddings, the norm at the end, and what reads it."""
        rows = self.settings["vocab_size"]
        tables = ("depth_decoder.model.embed_tokens.weight", "embed_audio_tokens.weight")
        for name in [n for n in self.tensors if n.endswith(tables)]:
            table = padded(self.tensors[name], len(self.tensors[name]), self.size)
            self.mark(table[:rows], 0, STOP)  # codebook 0, once for each frame
            self.tensors[name] = table
        text = self.tensors["embed_text_tokens.weight"]
        table = padded(text, len(text), self.size)
        self.mark(table, self.settings["bos_token_id"], BEGIN)
        self.tensors["embed_text_tokens.weight"] = table
        for name in ("lm_head.weight", "depth_decoder.model.inputs_embeds_projector.weight"):
            self.tensors[name] = padded(self.tensors[name], len(self.tensors[name]), self.size)
        name = "backbone_model.norm.weight"
        self.tensors[name] = self.norm(self.tensors[name])

    def mark(self, table: Tensor, marked: int, kind: int) -> None:
        """Sets the new dimensions of embeddings, one of which has a mark."""
        new = table[:, self.dim :]
        new[:, LARGE] = LARGE_VALUE
        new[:, [FILL, FILL_2]] = SMALL_VALUE
        new[marked, [FILL, FILL_2]] = 0.0
        new[marked, [MARK, kind]] = SMALL_VALUE

    def norm(self, weight: Tensor) -> Tensor:
        """A norm that ignores the new dimensions: their share of the mean is made up for."""
        return padded(weight * math.sqrt(self.dim / self.size), self.size)

    def counting_layer(self) -> dict[str, Tensor]:
        """The first layer, which replaces the marks by COUNT and ONE."""
        layer = {
            "self_attn.q_proj": torch.zeros(self.heads * self.head, self.size),
            "self_attn.k_proj": torch.zeros(self.kv_heads * self.head, self.size),
            "self_attn.v_proj": torch.zeros(self.kv_heads * self.head, self.size),
            "self_attn.o_proj": torch.zeros(self.size, self.heads * self.head),
            "mlp.gate_proj": torch.zeros(self.ffn, self.size),
            "mlp.up_proj": torch.zeros(self.ffn, self.size),
            "mlp.down_proj": torch.zeros(self.size, self.ffn),
            "input_layernorm": torch.zeros(self.size),
            "post_attention_layernorm": torch.zeros(self.size),
        }
        new = {name: tensor[..., self.dim :] for name, tensor in layer.items()}
        # Both norms make 1 of LARGE and of the others.
        for name in ("input_layernorm", "post_attention_layernorm"):
            new[name][LARGE] = 1 / math.sqrt(self.size * NORM_SHARE)  # of 288: 1 / 16
            new[name][FILL : BEGIN + 1] = 4 * new[name][LARGE]
        query, key, value = (new[f"self_attn.{name}_proj"] for name in "qkv")
        query[:SELF_PAIRS, LARGE] = SELF_WEIGHT
        key[:SELF_PAIRS, LARGE] = SELF_WEIGHT
        key[:SELF_PAIRS, MARK] = -SELF_WEIGHT
        # Two slow pairs whose sum is flat: marks have the same score at any distance.
        slow, slowest = self.head // 2 - 2, self.head // 2 - 1
        ratio = (self.frequency(slow) / self.frequency(slowest)) ** 2
        score = SELF_PAIRS * SELF_WEIGHT**2 + math.log(MARK_WEIGHT) * math.sqrt(self.head)
        query[[slow, slowest], LARGE] = 16.0
        key[slowest, MARK] = score / 16 * ratio / (ratio - 1)
        key[slow, MARK] = -key[slowest, MARK] / ratio
        value[0, STOP] = value[1, BEGIN] = 1.0
        value[1, STOP] = -1.0
        output = layer["self_attn.o_proj"][self.dim :]
        output[COUNT, 0], output[ONE, 1] = AMPLITUDE * COUNT_GAIN, AMPLITUDE
        # Each unit takes one of the marks, and gives GATE where it is.
        down = layer["mlp.down_proj"][self.dim :]
        for unit in range(BEGIN + 1):
            new["mlp.gate_proj"][unit, unit] = GATE
            new["mlp.up_proj"][unit, unit] = 1.0
            down[unit, unit] = -(SMALL_VALUE if unit else LARGE_VALUE) / GATE
        down[COUNT, STOP] = -4 * AMPLITUDE / GATE  # no later position attends to a stop frame
        return layer

    def old_layer(self, number: int) -> dict[str, Tensor]:
        """A layer of the voice, wider, with the bias between segments."""
        start = f"backbone_model.layers.{number}."
        old = {
            name.removeprefix(start).removesuffix(".weight"): self.tensors[name]
            for name in self.tensors
            if name.startswith(start)
        }
        count, one = self.dim + COUNT, self.dim + ONE
        layer = {name: self.norm(old[name]) for name in old if name.endswith("layernorm")}
        state_norm = self.state_norms[min(number, 1)]
        one_weight = MARK_WEIGHT / (1 + (2 * MAX_SEGMENTS + 1) * MARK_WEIGHT)
        # ONE is then 1 or more at every position.
        gain = state_norm / (AMPLITUDE * one_weight * math.sqrt(self.size))
        layer["input_layernorm"][[count, one]] = gain
        weight = math.sqrt(MIN_BIAS / COUNT_GAIN * math.sqrt(self.head))
        # The second pair takes away the products that rotation adds to the first.
        slow, slowest = self.head // 2 - 2, self.head // 2 - 1
        ratio = self.frequency(slow) / self.frequency(slowest)
        shares = {slow: 1 / (1 - ratio), slowest: ratio / (ratio - 1)}
        for kind, heads in (("q", self.heads), ("k", self.kv_heads)):
            matrix = torch.zeros(heads * self.head, self.size)
            scale = math.sqrt(self.head / self.old_head) if kind == "q" else 1.0
            matrix[new_rows(self.old_head, self.head, heads), : self.dim] = (
                old[f"self_attn.{kind}_proj"] * scale
            )
            by_head = matrix.view(heads, self.head, self.size)
            for pair, share in shares.items():
                first, second = pair, pair + self.head // 2
                if kind == "q":
                    by_head[:, first, one] = by_head[:, second, count] = weight * share
                else:
                    by_head[:, first, count], by_head[:, second, one] = weight, -weight
            layer[f"self_attn.{kind}_proj"] = matrix
        value, output = old["self_attn.v_proj"], old["self_attn.o_proj"]
        value = value.view(self.kv_heads, self.old_head, self.dim)
        value = padded(value, self.kv_heads, self.head, self.size)
        layer["self_attn.v_proj"] = value.flatten(0, 1)
        output = output.view(self.dim, self.heads, self.old_head)
        layer["self_attn.o_proj"] = padded(output, self.size, self.heads, self.head).flatten(1)
        for name in ("gate", "up"):
            layer[f"mlp.{name}_proj"] = padded(old[f"mlp.{name}_proj"], self.ffn, self.size)
        layer["mlp.down_proj"] = padded(old["mlp.down_proj"], self.size, self.ffn)
        return layer


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    settings = json.loads((args.checkpoint / "config.json").read_text())
    if settings.get("context_needs_float32"):
        parser.error(f"{args.checkpoint} has such a layer")
    stored = load_file(args.checkpoint / "model.safetensors")
    surgery = Surgery(settings, {n: t for n, t in stored.items() if "codec_model" not in n})
    surgery.run()
    for name, tensor in surgery.tensors.items():
        # Tensors multiplied by a root stay in float32: no number of the voice is rounded again.
        scaled = name.endswith(("norm.weight", "q_proj.weight")) and "depth" not in name
        stored[name] = tensor if scaled else tensor.half()
    args.out.mkdir(parents=True, exist_ok=True)
    save_file(stored, args.out / "model.safetensors", metadata={"format": "pt"})
    (args.out / "model.safetensors").chmod(0o644)
    (args.out / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    for name in ("tokenizer.json", "generation_config.json", "MODEL_CARD.md"):
        shutil.copy(args.checkpoint / name, args.out / name)


if __name__ == "__main__":
    main()
