"""After step 7: the acoustic codes that the language model would draw, for train_vocoder.py.

    python predict_codes.py RUN [--utterances 2500]

Writes RUN/predicted.npz: the codes of the first utterances, int16 [frames, K], where those after
codebook 0 and the pulses are the language model's likeliest ones, after a true history and true
codes of both. The sounds and the pulses thus stay those of the recorded speech.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import MimiConfig

from codec import PULSE_BOOK
from common import autocast, wait_while_paused
from lm import depth_logits, embed_frames, make_config, make_model, rope_table, run_stack
from lm_data import collate, length_of, load_examples

POSITIONS = 4096


@torch.no_grad()
def predict(model, batch):
    """`collate`d utterances -> the predicted codes [N, K] of all their frames, in order."""
    codes, targets = batch["codes"], batch["targets"]
    text, speech = model.embed_text_tokens(batch["tokens"]), embed_frames(model, codes)
    x = torch.where(batch["is_text"][..., None], text, speech)
    rope = rope_table(model.backbone_model, torch.arange(x.shape[1], device=x.device)[None])
    hidden, _ = run_stack(model.backbone_model, x, rope)
    is_frame = targets[..., 0] > 0
    hidden, drawn = hidden[is_frame], targets[is_frame]
    for book in range(PULSE_BOOK + 1, drawn.shape[1]):
        drawn[:, book] = depth_logits(model, hidden, drawn)[:, book - 1].argmax(-1)
    return drawn


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--name", default="lm")
    parser.add_argument("--utterances", type=int, default=2500)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(args.run / "tokenizer.json"))
    model = make_model(make_config(MimiConfig.from_pretrained(args.run / "codec"), tokenizer))
    model.codec_model = None
    state = torch.load(args.run / f"{args.name}.pt", map_location="cpu", weights_only=True)
    prefix = "model."
    language = state["language"].items()
    model.load_state_dict({k[len(prefix) :]: v for k, v in language if k.startswith(prefix)})
    model = model.to(args.device).eval()
    examples = load_examples(args.run)[: args.utterances]
    made, waiting = [None] * len(examples), []

    def flush():
        wait_while_paused()
        batch = collate([[examples[i]] for i in waiting], model.config.num_codebooks)
        batch = {key: tensor.to(args.device) for key, tensor in batch.items()}
        with autocast(args.device):
            drawn = predict(model, batch).cpu().numpy().astype(np.int16)
        lengths = [len(examples[i]["codes"]) for i in waiting]
        for index, codes in zip(waiting, np.split(drawn, np.cumsum(lengths)[:-1]), strict=True):
            made[index] = codes
        waiting.clear()

    for index in sorted(range(len(examples)), key=lambda i: length_of([examples[i]])):
        if (len(waiting) + 1) * length_of([examples[index]]) > POSITIONS:
            flush()
        waiting.append(index)
    flush()
    np.savez(args.run / "predicted.npz", codes=np.concatenate(made))
    true = np.concatenate([example["codes"] for example in examples])
    same = (np.concatenate(made) == true).mean(0)
    print("share of the speech's own codes:", *(f"{share:.2f}" for share in same))


if __name__ == "__main__":
    main()
