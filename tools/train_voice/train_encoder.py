"""Step 9: train the SEANet encoder, so that recorded audio can serve as context.

    python train_encoder.py RUN [--minutes 10] [--device cpu]

The codes were learnt with a mel front-end. The SEANet encoder, the encoder transformer and the
downsampling now learn to produce the same latents from the waveform: a regression of the
quantizer's two input projections, which determine the codes, relative to their variance. RUN/codec
is rewritten with the trained encoder.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import MimiModel

from codec import (
    CONTENT_DIM,
    PULSE_BOOK,
    load_codec,
    log_mel,
    parts,
    pulse_vectors,
    rvqs,
    waveform_latents,
)
from common import FRAME_SAMPLES, Speech, Training, autocast
from encode_speech import load_stage1
from pulse_codes import PULSE_DIM

BATCH = 8
WINDOW_FRAMES = 24


def projections(codec: MimiModel, latents):
    """The dimensions in which some codebook differs: [B, 2 * CONTENT_DIM + PULSE_DIM, N]."""
    semantic, acoustic = (rvq.input_proj(latents) for rvq in rvqs(codec))
    return torch.cat([semantic[:, :CONTENT_DIM], acoustic], 1)


def window(speech: Speech, rng):
    """The start of an utterance, or a piece from a random frame, zero-padded at its end; and its
    pulse codes."""
    index = speech.train[rng.integers(len(speech.train))]
    samples = speech.samples(index)
    frames = len(samples) // FRAME_SAMPLES
    start = rng.integers(max(1, frames - WINDOW_FRAMES + 1)) if rng.random() < 0.7 else 0
    piece = samples[start * FRAME_SAMPLES :][: WINDOW_FRAMES * FRAME_SAMPLES]
    pulses = speech.pulses(index)[start:][:WINDOW_FRAMES]
    missing = WINDOW_FRAMES - len(pulses)
    return np.pad(piece, (0, missing * FRAME_SAMPLES)), np.pad(pulses, (0, missing))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--warm-start", type=Path, metavar="VOICE", help="take its convolutions")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.manual_seed(0)
    codec = MimiModel.from_pretrained(args.run / "codec").to(args.device)
    stage1 = load_stage1(args.run, codec.config.num_quantizers).to(args.device)
    # The 25 Hz layers start from their weights of stage 1, trained with the mel front-end.
    own, start = parts(codec), parts(stage1.codec)
    own.encoder_transformer.load_state_dict(start.encoder_transformer.state_dict())
    if args.warm_start:
        earlier = parts(load_codec(args.warm_start))
        own.encoder_seanet.load_state_dict(earlier.encoder_seanet.state_dict())
    encoder = nn.ModuleList([own.encoder_seanet, own.encoder_transformer, own.downsample])
    trained = list(encoder.parameters())
    optimizer = torch.optim.AdamW(trained, lr=args.lr, betas=(0.9, 0.99))
    states = {"encoder": encoder, "optimizer": optimizer}
    training = Training(args.run, "encoder", args.minutes, states)
    speech = Speech(args.run)
    rng = np.random.default_rng(training.step)
    for _ in training.steps():
        columns = zip(*(window(speech, rng) for _ in range(BATCH)), strict=True)
        audio, pulses = (torch.from_numpy(np.stack(x)).to(args.device) for x in columns)
        with torch.no_grad():
            known = stage1.latents(log_mel(audio))
            target = projections(codec, known)
            target[:, -PULSE_DIM:] = pulse_vectors(codec, pulses)[:, -PULSE_DIM:]
            codes = codec.quantizer.encode(known)
            codes[PULSE_BOOK] = pulses
        with autocast(args.device):
            latents = waveform_latents(codec, audio)
        predicted = projections(codec, latents)
        loss = F.mse_loss(predicted, target) / target.var()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        with torch.no_grad():
            same = (codec.quantizer.encode(latents)[:2] == codes[:2]).float().mean((1, 2))
        training.log(regression=loss, same_code0=same[0], same_code1=same[1])
    codec.save_pretrained(args.run / "codec")


if __name__ == "__main__":
    main()
