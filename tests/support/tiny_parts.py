"""Parts of tiny checkpoints: a tokenizer, and weights that end an utterance at a chosen frame."""

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor

# The first two are Llama 3's; the others are CSM's names for two of Llama's reserved tokens.
SPECIAL_TOKENS = ("<|begin_of_text|>", "<|end_of_text|>", "<|AUDIO|>", "<|audio_eos|>")


def tiny_tokenizer() -> Tokenizer:
    """A byte-level BPE tokenizer with a few merges, which prepends a BOS as Llama 3's does."""
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

    This holds for any prompt. A few channels of the residual streams are made unwritable for all
    layers. In the backbone they are a counter of frames, one channel per state: text sets state 0;
    codebook 0's codes are divided into classes, state j allows only class j + 1, and that class's
    audio rows set state j + 1. State `frame` allows only code 0. In the depth decoder, one channel
    flags that the previous code was 0, and only then can the next one be 0.

    Args:
        tensors: by HF names; the two audio tables may be one tensor or two equal tensors.
        num_codebooks: K.
        frame: at least 0.
        near: the last codebook practically never gives 0, so the frame is not a stop frame and
            generation continues.
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
        # The sum of a frame's K rows is about sqrt(K) times one row; the state must exceed that.
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
