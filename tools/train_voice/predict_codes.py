"""After step 7: the acoustic codes that the language model expects, for train_vocoder.py.

    python predict_codes.py RUN --first 22000 [--utterances 2500]

Writes RUN/predicted.npz: the codes of utterances `first` and after, int16 [frames, K]. Choose
utterances that the language model was not trained on: it predicts those of its training too well.
Codebook 0 and the pulses are the speech's own; each code after them is the language model's
likeliest, given the frames before and the codes before it in the frame. The first pass reads the
recorded frames as history; each later pass reads the frames that the pass before it predicted, as
the model reads its own when it speaks.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from codec import PULSE_BOOK
from common import autocast, wait_while_paused
from export import load_lm
from lm import depth_logits, embed_frames, rope_table, run_stack
from lm_data import collate, length_of, load_examples

POSITIONS = 4096
PASSES = 2


@torch.no_grad()
def predict(model, batch, passes=PASSES):
    """`collate`d utterances -> the predicted codes [N, K] of all their frames, in order."""
    codes = batch["codes"].clone()
    for _ in range(passes):
        predicted = predict_next(model, batch, codes)
        codes[codes[..., 0] > 0] = predicted
    return predicted


def predict_next(model, batch, codes):
    """One pass: each frame's codes, given the frames before it in `codes` [B, S, K]."""
    targets = batch["targets"]
    text, speech = model.embed_text_tokens(batch["tokens"]), embed_frames(model, codes)
    x = torch.where(batch["is_text"][..., None], text, speech)
    rope = rope_table(model.backbone_model, torch.arange(x.shape[1], device=x.device)[None])
    hidden, _ = run_stack(model.backbone_model, x, rope)
    is_frame = targets[..., 0] > 0
    hidden, predicted = hidden[is_frame], targets[is_frame]
    size = model.config.codec_config.codebook_size  # the heads have a few more outputs
    for book in range(PULSE_BOOK + 1, predicted.shape[1]):
        logits = depth_logits(model, hidden, predicted)[:, book - 1, :size]
        predicted[:, book] = logits.argmax(-1)
    return predicted


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--name", default="lm")
    parser.add_argument("--first", type=int, required=True, help="the utterance to begin with")
    parser.add_argument("--utterances", type=int, default=2500)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    model = load_lm(args.run, args.name).to(args.device)
    examples = load_examples(args.run)[args.first :][: args.utterances]
    made, waiting = [None] * len(examples), []

    def flush():
        wait_while_paused()
        batch = collate([[examples[i]] for i in waiting], model.config.num_codebooks)
        batch = {key: tensor.to(args.device) for key, tensor in batch.items()}
        with autocast(args.device):
            predicted = predict(model, batch).cpu().numpy().astype(np.int16)
        lengths = [len(examples[i]["codes"]) for i in waiting]
        for index, codes in zip(waiting, np.split(predicted, np.cumsum(lengths)[:-1]), strict=True):
            made[index] = codes
        waiting.clear()

    for index in sorted(range(len(examples)), key=lambda i: length_of([examples[i]])):
        if waiting and (len(waiting) + 1) * length_of([examples[index]]) > POSITIONS:
            flush()
        waiting.append(index)
    flush()
    np.savez(args.run / "predicted.npz", codes=np.concatenate(made), first=args.first)
    true = np.concatenate([example["codes"] for example in examples])
    same = (np.concatenate(made) == true).mean(0)
    print("share of the speech's own codes:", *(f"{share:.2f}" for share in same))


if __name__ == "__main__":
    main()
