"""The built-in voice's language model: transformers' CSM with a forward pass for training.

The parameters live in transformers' own module, so saving gives a standard checkpoint. This forward
pass is leaner than transformers': it runs the depth decoder on one batch of selected frames, and
returns the queries and keys whose attention training supervises.
"""

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from transformers import CsmConfig, CsmForConditionalGeneration, MimiConfig

MAX_POSITIONS = 1024
"""The longest training sequence, and so the voice's context: some 40 s of speech."""


def make_config(codec: MimiConfig, tokenizer: Tokenizer) -> CsmConfig:
    codes = codec.codebook_size + 3  # as in CSM-1B: three more than the codec has
    token = tokenizer.token_to_id
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    return CsmConfig(
        num_codebooks=codec.num_quantizers,
        vocab_size=codes,
        text_vocab_size=tokenizer.get_vocab_size(),
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=5,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=MAX_POSITIONS,
        bos_token_id=token("<|begin_of_text|>"),
        eos_token_id=token("<|end_of_text|>"),
        pad_token_id=token("<|AUDIO|>"),
        audio_token_id=token("<|AUDIO|>"),
        audio_eos_token_id=token("<|audio_eos|>"),
        codebook_pad_token_id=codes - 1,
        codebook_eos_token_id=0,
        rope_parameters=rope,
        depth_decoder_config=dict(
            num_codebooks=codec.num_quantizers,
            backbone_hidden_size=256,
            vocab_size=codes,
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=2,
            num_attention_heads=3,
            num_key_value_heads=1,
            head_dim=64,
            max_position_embeddings=codec.num_quantizers + 1,
            rope_parameters=rope,
        ),
        codec_config=codec.to_dict(),
    )


def make_model(config: CsmConfig) -> CsmForConditionalGeneration:
    """Random weights; the depth decoder shares the backbone's audio embedding."""
    model = CsmForConditionalGeneration(config)
    with torch.no_grad():
        model.depth_decoder.codebooks_head.weight.normal_(0, 0.02)
    table = model.backbone_model.embed_tokens.embed_audio_tokens.weight
    model.depth_decoder.model.embed_tokens.weight = table
    return model


def embed_frames(model, codes):
    """Codes [..., K] -> [..., C]"""
    config = model.config
    offsets = torch.arange(config.num_codebooks, device=codes.device) * config.vocab_size
    table = model.backbone_model.embed_tokens.embed_audio_tokens
    return table(codes + offsets).sum(-2)


def rms_norm(norm, x):
    return F.rms_norm(x, (x.shape[-1],), norm.weight.to(x.dtype), norm.variance_epsilon)


def rotate(x, rope):
    cos, sin = rope
    low, high = x.chunk(2, -1)
    return x * cos + torch.cat((-high, low), -1) * sin


def rope_table(stack, positions):
    """cos and sin [B, 1, T, D] for integer positions [B, T]."""
    frequencies = positions[..., None].float() * stack.rotary_emb.inv_freq
    angles = torch.cat((frequencies, frequencies), -1)[:, None]
    return angles.cos(), angles.sin()


def short_attention(queries, keys, values):
    """Unfused causal attention. At training lengths it is 3 times faster on a CPU than the fused
    version, whose backward pass is slow there."""
    length = queries.shape[2]
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    scores = queries @ keys.transpose(2, 3) * queries.shape[3] ** -0.5
    return scores.masked_fill(future, -torch.inf).softmax(-1).to(values.dtype) @ values


def attention(layer, x, rope):
    """Returns (output [B, T, C], queries [B, Hq, T, D], keys [B, Hq, T, D])."""
    batch, length, _ = x.shape
    head_dim, groups = layer.head_dim, layer.num_key_value_groups

    def heads(projection):
        return projection(x).view(batch, length, -1, head_dim).transpose(1, 2)

    queries = rotate(heads(layer.q_proj), rope).to(x.dtype)
    keys, values = rotate(heads(layer.k_proj), rope).to(x.dtype), heads(layer.v_proj)
    keys, values = (t.repeat_interleave(groups, 1) for t in (keys, values))
    values = values.to(queries.dtype)
    if x.device.type == "cpu":
        mixed = short_attention(queries, keys, values)
    else:
        mixed = F.scaled_dot_product_attention(queries, keys, values, is_causal=True)
    mixed = mixed.transpose(1, 2).reshape(batch, length, -1)
    return layer.o_proj(mixed), queries, keys


def run_stack(stack, x, rope, watch=()):
    """Runs all layers and the final norm.

    Returns ([B, T, C], {layer: (queries, keys)} of the layers in `watch`).
    """
    watched = {}
    for number, layer in enumerate(stack.layers):
        mixed, queries, keys = attention(layer.self_attn, rms_norm(layer.input_layernorm, x), rope)
        if number in watch:
            watched[number] = queries, keys
        x = x + mixed
        hidden = rms_norm(layer.post_attention_layernorm, x)
        mlp = layer.mlp
        x = x + mlp.down_proj(F.silu(mlp.gate_proj(hidden)) * mlp.up_proj(hidden))
    return rms_norm(stack.norm, x), watched


def depth_logits(model, hidden, codes):
    """Teacher-forced depth decoder: hidden [N, C], codes [N, K] -> logits [N, K - 1, V]."""
    depth = model.depth_decoder
    count = model.config.num_codebooks
    offsets = torch.arange(count - 1, device=codes.device) * model.config.vocab_size
    previous = depth.model.embed_tokens(codes[:, : count - 1] + offsets)
    x = depth.model.inputs_embeds_projector(torch.cat((hidden[:, None].to(previous), previous), 1))
    positions = torch.arange(count, device=codes.device)[None]
    x, _ = run_stack(depth.model, x, rope_table(depth.model, positions))
    return torch.einsum("nkd,kdv->nkv", x[:, 1:], depth.codebooks_head.weight.to(x.dtype))
