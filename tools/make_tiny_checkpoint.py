"""Write a complete tiny checkpoint of random weights: it makes noise, not speech.

    python tools/make_tiny_checkpoint.py FOLDER [--seed 0] [--frames 25]

The folder loads like sesame/csm-1b (config.json, model.safetensors with the codec inside,
tokenizer.json), here and in transformers, and needs neither transformers nor a network to be
written. Every utterance ends after `--frames` frames of 80 ms.
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor

# The first two are Llama 3's; the others are what CSM calls two of Llama's reserved tokens.
SPECIAL_TOKENS = ("<|begin_of_text|>", "<|end_of_text|>", "<|AUDIO|>", "<|audio_eos|>")
# Mimi has three codes less than CSM: CSM's vocabulary keeps room for specials.
SPARE_CODES = 3


def tiny_tokenizer() -> Tokenizer:
    """A byte-level BPE tokenizer with some merges and Llama 3's way of adding a BOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    corpus = ["the quick brown fox and the lazy dog", "this is what that thing is there for"]
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL_TOKENS])
    bos = SPECIAL_TOKENS[0]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A",
        pair=f"{bos} $A {bos}:1 $B:1",
        special_tokens=[(bos, tokenizer.token_to_id(bos))],
    )
    return tokenizer


def force_stop(
    tensors: dict[str, Tensor], num_codebooks: int, frame: int, near: bool = False
) -> None:
    """Change CSM weights in place so that generation gives an all-zero frame at index `frame`.

    Whatever the prompt. Some channels of the residual streams are taken out of every layer's
    reach. In the backbone, one channel per state says how many frames there were: text writes
    state 0, and codebook 0's codes fall into classes, of which state j allows only class j + 1,
    whose audio rows write state j + 1. State `frame` allows only code 0. In the depth decoder, one
    channel says whether the code before was 0, and lets the next be 0 only then.

    Args:
        tensors: by HF names; the two audio tables may be one tensor or two equal ones.
        num_codebooks: K.
        frame: at least 0.
        near: the last codebook (all but) never gives 0, so the frame is no stop, and generation
            goes on.
    """
    if frame < 0:
        raise ValueError(f"frame: {frame} is negative")
    lm_head = tensors["lm_head.weight"]
    vocab_size, dim = lm_head.shape
    states, zero = torch.arange(frame + 1), frame + 1
    if zero >= dim or frame >= vocab_size:
        raise ValueError(f"frame: {frame} does not fit a width of {dim} and {vocab_size} codes")
    classes = torch.zeros(vocab_size, dtype=torch.int64)
    if frame:
        classes[1:] = 1 + torch.arange(vocab_size - 1) % frame

    backbone, depth = "backbone_model.", "depth_decoder.model."
    for name, tensor in tensors.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            if name.startswith(backbone):
                tensor[: zero + 1] = 0
            elif name.startswith(depth):
                tensor[0] = 0
        elif name.endswith("norm.weight") and name.startswith((backbone, depth)):
            tensor[: zero + 1] = 1

    text = tensors["embed_text_tokens.weight"]
    text[:, : zero + 1] = 0
    text[:, 0] = 4
    for name in (
        "backbone_model.embed_tokens.embed_audio_tokens.weight",
        "depth_decoder.model.embed_tokens.weight",
    ):
        if name not in tensors:
            continue
        rows = tensors[name].view(num_codebooks, vocab_size, dim)
        rows[..., : zero + 1] = 0
        # A frame's rows add up to sqrt(K) times one row: so much must the state stand out.
        rows[0, torch.arange(1, vocab_size), classes[1:]] = 4 * num_codebooks**0.5
        if frame == 0:
            rows[0, :, 0] = 0
        rows[:, :, zero] = -0.1
        rows[:, 0, zero] = 0.1

    lm_head[:, : zero + 1] = 0
    for state in states.tolist():
        if state < frame:
            lm_head[classes == state + 1, state] = 30.0
            lm_head[0, state] = -30.0
        else:
            lm_head[0, state] = 30.0

    projection = tensors["depth_decoder.model.inputs_embeds_projector.weight"]
    projection[:, : zero + 1] = 0
    projection[0] = 0
    projection[0, zero] = 40.0
    heads = tensors["depth_decoder.codebooks_head.weight"]  # [K - 1, Cd, V]
    heads[:, 0] = 0
    heads[:, 0, 0] = 30.0
    if near:
        heads[-1, :, 0] = 0


def tiny_config(tokenizer: Tokenizer) -> dict:
    """config.json of the tiny checkpoint, in transformers' keys."""
    num_codebooks, codec_codes = 8, 128
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 0.125,
        "high_freq_factor": 0.5,
        "original_max_position_embeddings": 1024,
    }
    llama = {
        "attention_bias": False,
        "hidden_act": "silu",
        "mlp_bias": False,
        "num_codebooks": num_codebooks,
        "num_hidden_layers": 2,
        "rms_norm_eps": 1e-5,
        "vocab_size": codec_codes + SPARE_CODES,
    }
    bos, eos, audio, audio_eos = (tokenizer.token_to_id(name) for name in SPECIAL_TOKENS)
    return llama | {
        "architectures": ["CsmForConditionalGeneration"],
        "model_type": "csm",
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 2048,
        "rope_parameters": rope,
        "text_vocab_size": tokenizer.get_vocab_size(),
        "tie_codebooks_embeddings": True,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "pad_token_id": audio,
        "audio_token_id": audio,
        "audio_eos_token_id": audio_eos,
        "codebook_eos_token_id": 0,
        "codebook_pad_token_id": codec_codes + SPARE_CODES - 1,
        "depth_decoder_config": llama
        | {
            "model_type": "csm_depth_decoder_model",
            "backbone_hidden_size": 128,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": num_codebooks + 1,
            "rope_parameters": rope
            | {
                "low_freq_factor": 0.001953125,
                "high_freq_factor": 0.0078125,
                "original_max_position_embeddings": 16,
            },
        },
        "codec_config": {
            "model_type": "mimi",
            "sampling_rate": 24000,
            "upsampling_ratios": [8, 6, 5, 4],
            "num_filters": 8,
            "num_residual_layers": 1,
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "head_dim": 16,
            "intermediate_size": 128,
            "sliding_window": 250,
            "upsample_groups": 64,
            "num_quantizers": num_codebooks,
            "num_semantic_quantizers": 1,
            "codebook_size": codec_codes,
            "codebook_dim": 32,
            "vector_quantization_hidden_dimension": 32,
        },
    }


def random_tensors(config: dict, seed: int) -> dict[str, Tensor]:
    """Every tensor of CSM and its codec by HF name, scaled so that activations keep their size."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in (_csm_shapes(config) | _codec_shapes(config["codec_config"])).items():
        noise = torch.randn(shape, generator=generator)
        if name.endswith((".initialized", ".cluster_usage")):
            tensors[name] = torch.ones(shape)
        elif "norm" in name:
            tensors[name] = torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
        elif name.endswith(".bias"):
            tensors[name] = torch.zeros(shape)
        elif name.endswith("_scale.scale"):
            tensors[name] = torch.full(shape, 0.2)
        elif name.endswith((".embed_sum", "_tokens.weight")):
            tensors[name] = noise
        elif name.endswith("codebooks_head.weight"):  # [K - 1, in, out]
            tensors[name] = noise * shape[1] ** -0.5
        else:
            tensors[name] = noise * torch.Size(shape[1:]).numel() ** -0.5
    return tensors


def _csm_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    depth = config["depth_decoder_config"]
    width, depth_width = config["hidden_size"], depth["hidden_size"]
    codebooks, codes = config["num_codebooks"], config["vocab_size"]
    shapes = {
        "embed_text_tokens.weight": (config["text_vocab_size"], width),
        "depth_decoder.model.embed_tokens.weight": (codebooks * codes, width),
        "lm_head.weight": (codes, width),
        "depth_decoder.model.inputs_embeds_projector.weight": (depth_width, width),
        "depth_decoder.codebooks_head.weight": (codebooks - 1, depth_width, codes),
    }
    for prefix, part in (("backbone_model", config), ("depth_decoder.model", depth)):
        width, ffn = part["hidden_size"], part["intermediate_size"]
        q = part["num_attention_heads"] * part["head_dim"]
        kv = part["num_key_value_heads"] * part["head_dim"]
        for i in range(part["num_hidden_layers"]):
            layer = {
                "self_attn.q_proj": (q, width),
                "self_attn.k_proj": (kv, width),
                "self_attn.v_proj": (kv, width),
                "self_attn.o_proj": (width, q),
                "mlp.gate_proj": (ffn, width),
                "mlp.up_proj": (ffn, width),
                "mlp.down_proj": (width, ffn),
                "input_layernorm": (width,),
                "post_attention_layernorm": (width,),
            }
            shapes |= {f"{prefix}.layers.{i}.{name}.weight": s for name, s in layer.items()}
        shapes[f"{prefix}.norm.weight"] = (width,)
    return shapes


def _codec_shapes(codec: dict) -> dict[str, tuple[int, ...]]:
    width, filters = codec["hidden_size"], codec["num_filters"]
    shapes = {"downsample.conv.weight": (width, width, 4), "upsample.conv.weight": (width, 1, 4)}

    def conv(name: str, *shape: int, bias: int | None = None) -> None:
        shapes[f"{name}.conv.weight"] = shape
        shapes[f"{name}.conv.bias"] = (bias or shape[0],)

    def residual(name: str, channels: int) -> None:
        conv(f"{name}.block.1", channels // 2, channels, 3)
        conv(f"{name}.block.3", channels, channels // 2, 1)

    channels, i = filters, 1
    conv("encoder.layers.0", channels, 1, 7)
    for ratio in reversed(codec["upsampling_ratios"]):
        residual(f"encoder.layers.{i}", channels)
        conv(f"encoder.layers.{i + 2}", 2 * channels, channels, 2 * ratio)
        channels, i = 2 * channels, i + 3
    conv(f"encoder.layers.{i + 1}", width, channels, 3)

    conv("decoder.layers.0", channels, width, 7)
    i = 2
    for ratio in codec["upsampling_ratios"]:
        # A transposed convolution stores its input channels first.
        conv(f"decoder.layers.{i}", channels, channels // 2, 2 * ratio, bias=channels // 2)
        residual(f"decoder.layers.{i + 1}", channels // 2)
        channels, i = channels // 2, i + 3
    conv(f"decoder.layers.{i}", 1, channels, 3)

    for part in ("encoder", "decoder"):
        for i in range(codec["num_hidden_layers"]):
            layer = f"{part}_transformer.layers.{i}"
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                shapes[f"{layer}.self_attn.{name}.weight"] = (width, width)
            shapes[f"{layer}.mlp.fc1.weight"] = (codec["intermediate_size"], width)
            shapes[f"{layer}.mlp.fc2.weight"] = (width, codec["intermediate_size"])
            for name in ("input_layernorm", "post_attention_layernorm"):
                shapes[f"{layer}.{name}.weight"] = shapes[f"{layer}.{name}.bias"] = (width,)
            for name in ("self_attn_layer_scale", "mlp_layer_scale"):
                shapes[f"{layer}.{name}.scale"] = (width,)

    code_width, codes = codec["codebook_dim"], codec["codebook_size"]
    semantic = codec["num_semantic_quantizers"]
    for kind, count in (("semantic", semantic), ("acoustic", codec["num_quantizers"] - semantic)):
        quantizer = f"quantizer.{kind}_residual_vector_quantizer"
        shapes[f"{quantizer}.input_proj.weight"] = (code_width, width, 1)
        shapes[f"{quantizer}.output_proj.weight"] = (width, code_width, 1)
        for i in range(count):
            codebook = f"{quantizer}.layers.{i}.codebook"
            shapes[f"{codebook}.initialized"] = (1,)
            shapes[f"{codebook}.cluster_usage"] = (codes,)
            shapes[f"{codebook}.embed_sum"] = (codes, code_width)
    return {f"codec_model.{name}": shape for name, shape in shapes.items()}


def write_tiny_checkpoint(folder: Path, seed: int = 0, frames: int = 25) -> Path:
    """Write the checkpoint of this module's docstring and return its folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = tiny_tokenizer()
    config = tiny_config(tokenizer)
    tensors = random_tensors(config, seed)
    force_stop(tensors, config["num_codebooks"], frames)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--frames", type=int, default=25, help="length of every utterance")
    args = parser.parse_args()
    try:
        write_tiny_checkpoint(args.folder, args.seed, args.frames)
    except ValueError as error:
        parser.error(str(error))
    print(f"{args.folder}: random weights; they make noise, not speech")


if __name__ == "__main__":
    main()
