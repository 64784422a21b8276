"""The engine's oracle: transformers' CSM, run step by step with Sesame's stop rule.

Every call recomputes the whole sequence without a KV cache, so it shares no shortcut with the
engine.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Trace(NamedTuple):
    """The reference's results for each generated frame, except a stop frame.

    Attributes:
        codes: `[N, K]` int64, greedy.
        hidden: `[N, C]`, the backbone's last hidden state after its norm.
        logits: `[N, K, V]`.
        stopped: an all-zero frame ended generation (otherwise `max_frames` did).
    """

    codes: Tensor
    hidden: Tensor
    logits: Tensor
    stopped: bool


def reference_tokens(tokenizer, speaker: int, text: str) -> list[int]:
    """`<|begin_of_text|>[speaker]text<|end_of_text|>`, special strings in `text` as plain text."""
    tokenizer.encode_special_tokens = True
    ids = tokenizer.encode(f"[{speaker}]{text}", add_special_tokens=False).ids
    return [
        tokenizer.token_to_id("<|begin_of_text|>"),
        *ids,
        tokenizer.token_to_id("<|end_of_text|>"),
    ]


def reference_prompt(tiny, segments) -> Tensor:
    """The backbone's input embeddings `[1, T, C]` of segments with `speaker, text, codes`."""
    parts = []
    for segment in segments:
        ids = torch.tensor([reference_tokens(tiny.tokenizer, segment.speaker, segment.text)])
        parts.append(tiny.model.embed_text_tokens(ids))
        if segment.codes is not None:
            end = torch.zeros(1, segment.codes.shape[1], dtype=torch.int64)
            parts.append(
                tiny.model.backbone_model.embed_tokens(torch.cat([segment.codes, end])[None])
            )
    return torch.cat(parts, dim=1)


@torch.no_grad()
def reference_frame(model, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """One greedy frame from the backbone's hidden state `[C]`: codes `[K]`, logits `[K, V]`."""
    logits = [model.lm_head(hidden)]
    codes = [0, int(logits[0].argmax())]  # position 0 is where the hidden state goes
    for _ in range(model.config.num_codebooks - 1):
        out = model.depth_decoder(
            input_ids=torch.tensor([codes]),
            backbone_last_hidden_state=hidden[None],
            use_cache=False,
        )
        logits.append(out.logits[0, -1])
        codes.append(int(logits[-1].argmax()))
    return torch.tensor(codes[1:]), torch.stack(logits)


@torch.no_grad()
def reference_trace(tiny, segments, max_frames: int) -> Trace:
    """Greedy generation for segments with `speaker, text, codes`; the last one is spoken."""
    model = tiny.model
    inputs = reference_prompt(tiny, segments)
    codes, hiddens, logits = [], [], []
    stopped = False
    while len(codes) < max_frames:
        hidden = model.backbone_model(inputs_embeds=inputs, use_cache=False).last_hidden_state[
            0, -1
        ]
        frame, frame_logits = reference_frame(model, hidden)
        if not frame.any():
            stopped = True
            break
        codes.append(frame)
        hiddens.append(hidden)
        logits.append(frame_logits)
        inputs = torch.cat([inputs, model.backbone_model.embed_tokens(frame[None, None])], dim=1)
    k, v = tiny.shape.num_codebooks, tiny.shape.audio_vocab_size
    return Trace(
        torch.stack(codes) if codes else torch.zeros(0, k, dtype=torch.int64),
        torch.stack(hiddens) if hiddens else torch.zeros(0, tiny.shape.dim),
        torch.stack(logits) if logits else torch.zeros(0, k, v),
        stopped,
    )


def reference_generate(tiny, segments, max_frames: int) -> Tensor:
    """Greedy codes `[N, K]` int64 of `reference_trace`."""
    return reference_trace(tiny, segments, max_frames).codes
