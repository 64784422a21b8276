"""The built-in voice's language model: transformers' CSM with a forward pass made for training.

The parameters live in transformers' own module, so saving gives a standard checkpoint. The forward
pass here is leaner than transformers', takes one depth-decoder batch of chosen frames, and hands
out the attention scores that training supervises.
"""

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from transformers import CsmConfig, CsmForConditionalGeneration, MimiConfig


def make_config(codec: MimiConfig, tokenizer: Tokenizer) -> CsmConfig:
    codes = codec.codebook_size + 3  # as CSM-1B: three more than the codec knows
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
        max_position_embeddings=2048,
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
    """Causal attention in plain steps: for training lengths 3 times faster on a CPU than the fused
    one, whose backward pass is slow there."""
    length = queries.shape[2]
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    scores = queries @ keys.transpose(2, 3) * queries.shape[3] ** -0.5
    return scores.masked_fill(future, -torch.inf).softmax(-1).to(values.dtype) @ values


def attention(layer, x, rope, mask=None, cache=None):
    """-> (output [B, T, C], queries [B, Hq, T, D], keys [B, Hq, T', D])"""
    batch, length, _ = x.shape
    head_dim, groups = layer.head_dim, layer.num_key_value_groups

    def heads(projection):
        return projection(x).view(batch, length, -1, head_dim).transpose(1, 2)

    queries = rotate(heads(layer.q_proj), rope).to(x.dtype)
    keys, values = rotate(heads(layer.k_proj), rope).to(x.dtype), heads(layer.v_proj)
    if cache is not None:
        keys, values = cache.extend(layer, keys, values)
    keys, values = (t.repeat_interleave(groups, 1) for t in (keys, values))
    values = values.to(queries.dtype)
    if mask is None and cache is None and x.device.type == "cpu":
        mixed = short_attention(queries, keys, values)
    else:
        mixed = F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, is_causal=mask is None and length > 1
        )
    mixed = mixed.transpose(1, 2).reshape(batch, length, -1)
    return layer.o_proj(mixed), queries, keys


def run_stack(stack, x, rope, mask=None, cache=None, watch=()):
    """All layers and the final norm. -> ([B, T, C], {layer: (queries, keys)} of watched layers)"""
    watched = {}
    for number, layer in enumerate(stack.layers):
        mixed, queries, keys = attention(
            layer.self_attn, rms_norm(layer.input_layernorm, x), rope, mask, cache
        )
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


class Cache:
    """Keys and values of every layer so far."""

    def __init__(self):
        self.entries = {}

    def extend(self, layer, keys, values):
        if layer in self.entries:
            old = self.entries[layer]
            keys, values = torch.cat((old[0], keys), 2), torch.cat((old[1], values), 2)
        self.entries[layer] = keys, values
        return keys, values


def draw(logits, temperature, top_k):
    """Temperature, top-k, draw: [B, V] -> [B]; temperature 0 is greedy."""
    if temperature == 0:
        return logits.argmax(-1)
    threshold = logits.topk(top_k, -1).values[:, -1:]
    logits = (logits / temperature).masked_fill(logits < threshold, -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1)[:, 0]


@torch.no_grad()
def generate(model, prompts, temperature=0.6, top_k=50, max_frames=None):
    """Speak several prompts (token id lists) at once. -> [codes [frames, K]], True where it ended.

    `max_frames` defaults to 15 plus three frames for every two tokens, far beyond what a sane
    reading takes.
    """
    device = model.lm_head.weight.device
    backbone, depth = model.backbone_model, model.depth_decoder
    longest = max(map(len, prompts))
    max_frames = max_frames or 15 + longest * 3 // 2
    pads = torch.tensor([longest - len(p) for p in prompts], device=device)
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=device)
    valid = torch.arange(longest, device=device)[None] >= pads[:, None]
    positions = (torch.arange(longest, device=device)[None] - pads[:, None]).clamp(min=0)
    causal = torch.ones(longest, longest, dtype=torch.bool, device=device).tril()
    # A padding row attends to itself alone, so that no softmax is empty.
    mask = (causal & valid[:, None]) | torch.eye(longest, dtype=torch.bool, device=device)
    cache = Cache()
    x = model.embed_text_tokens(ids)
    hidden, _ = run_stack(backbone, x, rope_table(backbone, positions), mask[:, None], cache)
    hidden = hidden[:, -1]
    frames, live = [], torch.ones(len(prompts), dtype=torch.bool, device=device)
    ends = torch.full((len(prompts),), max_frames, device=device)
    for frame in range(max_frames):
        codes = [draw(model.lm_head(hidden), temperature, top_k)]
        depth_cache = Cache()
        x = hidden
        for k in range(model.config.num_codebooks):
            rope = rope_table(depth.model, torch.tensor([[k]], device=device))
            x = depth.model.inputs_embeds_projector(x)[:, None]
            x, _ = run_stack(depth.model, x, rope, cache=depth_cache)
            if k > 0:
                logits = x[:, 0] @ depth.codebooks_head.weight[k - 1]
                codes.append(draw(logits, temperature, top_k))
            if k < model.config.num_codebooks - 1:
                x = depth.model.embed_tokens(codes[-1] + k * model.config.vocab_size)
        codes = torch.stack(codes, -1)
        stopped = live & (codes == 0).all(-1)
        ends[stopped] = frame
        live &= ~stopped
        frames.append(codes)
        if not live.any():
            break
        valid = torch.cat((valid, torch.ones_like(valid[:, :1])), 1)
        rope = rope_table(backbone, (longest + frame - pads)[:, None])
        x = embed_frames(model, codes)[:, None]
        hidden, _ = run_stack(backbone, x, rope, valid[:, None, None], cache)
        hidden = hidden[:, 0]
    stream = torch.stack(frames, 1).cpu()
    return [stream[i, : int(end)] for i, end in enumerate(ends)], ~live.cpu()
