"""Step 7: train the language model from text to codes.

    python train_lm.py RUN [--name lm] [--minutes 60] [--device cpu]

A model of 6 M parameters tends to continue the previous audio as babble instead of reading the
text. Three things prevent it:
- Alignment. The teacher's phone durations give the token of each frame. In the watched layer, one
  attention head is trained to attend to the token of the next frame, another to the token of the
  frame after that (cross entropy on the attention weights).
- A corrupted history. In most utterances, a share of the acoustic codes of past frames, some codes
  of codebook 0 and some whole frames are replaced by those of other frames. Targets stay clean.
- An auxiliary loss: the last hidden state must also predict the phones of the next frame.
Half of the sequences begin with 1 to 3 earlier segments, of either speaker, as context. These have
the same losses, so no position is wasted.
The depth decoder trains on a random share of the frames. RUN/NAME.pt is the checkpoint.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import nn
from transformers import MimiConfig

from codec import PULSE_BOOK
from common import Speech, Training, autocast, read_sounds
from lm import depth_logits, embed_frames, make_config, make_model, rope_table, run_stack
from lm_data import LABELS_PER_FRAME, batches, collate, describe, load_examples
from lm_warm_start import transfer
from muon import Muon

WATCHED_LAYER = 2
CURRENT_HEAD, NEXT_HEAD = 0, 3  # in different key groups
ALIGNMENT_WEIGHT = 0.5
PHONE_WEIGHT = 0.3
DEPTH_WEIGHT = 2.0
DEPTH_SHARE = 0.25
CLEAN_SHARE = 0.15  # share of utterances whose history stays clean
MAX_ACOUSTIC_NOISE = 0.7
CODE0_NOISE = 0.35  # relative to the acoustic noise of the same utterance
PULSE_NOISE = 0.35  # likewise: a pulse starts where the one of the previous frame ended
FRAME_NOISE = 0.2


def corrupt(codes, is_frame):
    """Replaces a random share of the history by codes of random frames of the batch."""
    batch, length, count = codes.shape
    device = codes.device
    noise = torch.rand(batch, 1, 1, device=device) * MAX_ACOUSTIC_NOISE
    noise *= torch.rand(batch, 1, 1, device=device) > CLEAN_SHARE
    share = noise.expand(-1, -1, count).clone()
    share[..., 0] *= CODE0_NOISE
    share[..., PULSE_BOOK] *= PULSE_NOISE
    pool = codes[is_frame]
    each = torch.arange(count, device=device)
    # `mixed` takes each codebook from its own random frame, `whole` all of them from one frame.
    mixed = pool[torch.randint(len(pool), codes.shape, device=device), each]
    whole = pool[torch.randint(len(pool), (batch, length), device=device)]
    replaced = torch.where(torch.rand(codes.shape, device=device) < share, mixed, codes)
    drop = torch.rand(batch, length, 1, device=device) < noise * FRAME_NOISE
    return torch.where(drop, whole, replaced)


def alignment_loss(queries, keys, spoken, head):
    """Cross entropy between one head's attention and the tokens being spoken.

    queries, keys [B, H, S, D]; spoken [B, S, N]: rows of zeros are ignored.
    """
    length, count = queries.shape[2], spoken.shape[2]
    scores = queries[:, head] @ keys[:, head].transpose(1, 2) * queries.shape[-1] ** -0.5
    future = torch.ones(length, length, dtype=torch.bool, device=scores.device).triu(1)
    logs = scores.float().masked_fill(future, -torch.inf).log_softmax(-1)[..., :count]
    # Avoids 0 * -inf at text positions, which cannot see later tokens.
    return -torch.where(spoken > 0, spoken * logs, 0.0).sum() / spoken.sum()


def losses(model, phone_head, batch, train: bool):
    codes, targets, spoken = batch["codes"], batch["targets"], batch["spoken"]
    is_frame = codes[..., 0] > 0
    history = torch.where(is_frame[..., None], corrupt(codes, is_frame), codes) if train else codes
    x = torch.where(
        batch["is_text"][..., None],
        model.embed_text_tokens(batch["tokens"]),
        embed_frames(model, history),
    )
    positions = torch.arange(x.shape[1], device=x.device)[None]
    backbone = model.backbone_model
    hidden, watched = run_stack(
        backbone, x, rope_table(backbone, positions), watch=(WATCHED_LAYER,)
    )
    queries, keys = watched[WATCHED_LAYER]
    following = F.pad(spoken, (0, 0, 0, 1))[:, 1:]
    alignment = alignment_loss(queries, keys, spoken, CURRENT_HEAD)
    alignment = alignment + alignment_loss(queries, keys, following, NEXT_HEAD)

    has_target = targets[..., 0] >= 0
    target_hidden = hidden[has_target]
    target = targets[has_target]
    logits = model.lm_head(target_hidden).float()
    phone_logits = phone_head(target_hidden).float().view(-1, LABELS_PER_FRAME, phone_head.phones)
    selected = torch.rand(len(target), device=x.device) < (DEPTH_SHARE if train else 1.1)
    selected |= target[:, 0] == 0
    acoustic = depth_logits(model, target_hidden[selected], target[selected]).float()
    return {
        "code0": F.cross_entropy(logits, target[:, 0]),
        "depth": F.cross_entropy(acoustic.flatten(0, 1), target[selected][:, 1:].flatten()),
        "align": alignment / 2,
        "phone": F.cross_entropy(
            phone_logits.flatten(0, 1), batch["labels"][has_target].flatten(), ignore_index=-100
        ),
    }


def split_parameters(model, phone_head):
    """Splits parameters: matrices inside the layers for Muon, everything else for AdamW."""
    matrices, rest = [], list(phone_head.parameters())
    seen = set()
    for name, parameter in model.named_parameters():
        if name.startswith("codec_model") or parameter in seen:
            continue
        seen.add(parameter)
        (matrices if ".layers." in name and parameter.ndim == 2 else rest).append(parameter)
    return matrices, rest


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--name", default="lm")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--positions", type=int, default=4096)
    parser.add_argument("--lr", type=float, default=0.02, help="learning rate of Muon")
    parser.add_argument("--adam-lr", type=float, default=2e-3)
    parser.add_argument("--warm-start", type=Path, metavar="VOICE", help="see lm_warm_start.py")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.manual_seed(0)
    tokenizer = Tokenizer.from_file(str(args.run / "tokenizer.json"))
    codec_config = MimiConfig.from_pretrained(args.run / "codec")
    model = make_model(make_config(codec_config, tokenizer))
    if args.warm_start and not (args.run / f"{args.name}.pt").exists():
        transfer(model, args.warm_start, args.run)
    model = model.to(args.device)
    num_phones = len(read_sounds(args.run))
    phone_head = nn.Linear(model.config.hidden_size, LABELS_PER_FRAME * num_phones)
    phone_head = phone_head.to(args.device)
    phone_head.phones = num_phones
    matrices, rest = split_parameters(model, phone_head)
    language = nn.ModuleDict({"model": model, "phone_head": phone_head})
    model.codec_model = None  # trained by other steps; not in this checkpoint
    print(f"{sum(p.numel() for p in language.parameters()) / 1e6:.2f} M parameters")
    states = {
        "language": language,
        "muon": Muon(matrices, lr=args.lr, weight_decay=0.01),
        "adam": torch.optim.AdamW(rest, lr=args.adam_lr, betas=(0.9, 0.98), weight_decay=0.01),
    }
    examples = load_examples(args.run)
    print(describe(examples))
    training = Training(args.run, args.name, args.minutes, states, warmup=100)
    torch.manual_seed(training.step)
    rng = np.random.default_rng(training.step)
    train_indices = [i for i in range(len(examples)) if i % Speech.HOLD_OUT]
    held_out = [e for i, e in enumerate(examples) if i % Speech.HOLD_OUT == 0][:120]
    held_out.sort(key=lambda e: len(e["codes"]))
    after_context = [held_out[i : i + 3] for i in range(0, len(held_out), 3)]
    stream = batches(examples, train_indices, rng, args.positions)

    def on_device(items):
        batch = collate(items, model.config.num_codebooks)
        return {key: tensor.to(args.device) for key, tensor in batch.items()}

    def validate(sequences, name):
        """Records the losses of sequences, sorted by length."""
        with torch.no_grad(), autocast(args.device):
            rows = [
                losses(model, phone_head, on_device(sequences[i : i + 15]), train=False)
                for i in range(0, len(sequences), 15)
            ]
        training.record(
            **{f"{name}_{k}": torch.stack([r[k] for r in rows]).mean() for k in rows[0]}
        )

    for step in training.steps():
        batch = on_device([[examples[i] for i in sequence] for sequence in next(stream)])
        with autocast(args.device):
            loss = losses(model, phone_head, batch, train=True)
        total = (
            loss["code0"]
            + DEPTH_WEIGHT * loss["depth"]
            + ALIGNMENT_WEIGHT * loss["align"]
            + PHONE_WEIGHT * loss["phone"]
        )
        for optimizer in (states["muon"], states["adam"]):
            optimizer.zero_grad()
        total.backward()
        nn.utils.clip_grad_norm_(matrices + rest, 1.0)
        states["muon"].step()
        states["adam"].step()
        training.log(**loss)
        if (step + 1) % 250 == 0:
            validate([[e] for e in held_out], "val")
            validate(after_context, "after")


if __name__ == "__main__":
    main()
