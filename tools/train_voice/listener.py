"""Trains a small classifier of sounds, a perceptual loss for the decoder.

    python listener.py RUN [--minutes 4]

It names the sound of every 10 ms of a log-mel spectrogram. With --listener-weight, train_vocoder.py
compares its outputs for decoded and for recorded speech. RUN/listener.pt is the checkpoint.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from codec import MEL_BINS, MEL_HOP_SAMPLES, log_mel
from common import FRAME_SAMPLES, Speech, Training

CHANNELS = 192
DILATIONS = (1, 1, 2)
EDGE_STEPS = 12  # steps at either end of a crop whose input includes padding
BATCH = 16
CROP_FRAMES = 16
MEL_NOISE = 0.3  # nats; hides fine detail, which the codes lose anyway


class Listener(nn.Module):
    """Speech [B, S] -> features [B, CHANNELS, S / 240] of each layer, logits of the sounds
    [B, S / 240, sounds]. An output depends on 120 ms of audio to either side."""

    def __init__(self, sounds: int):
        super().__init__()
        self.input = nn.Conv1d(MEL_BINS, CHANNELS, 5, padding=2)
        self.convs = nn.ModuleList(
            nn.Conv1d(CHANNELS, CHANNELS, 5, padding=2 * d, dilation=d) for d in DILATIONS
        )
        self.output = nn.Linear(CHANNELS, sounds)

    def forward(self, audio):
        mel = log_mel(audio) / 3 + 1
        if self.training:
            mel = mel + MEL_NOISE / 3 * torch.randn_like(mel)
        x = self.input(mel)
        features = []
        for conv in self.convs:
            x = x + conv(F.gelu(x))
            features.append(x)
        return features, self.output(F.gelu(x).transpose(1, 2))


def inner(steps):
    """Drops the steps at both ends whose input includes padding; time is dimension 1."""
    return steps[:, EDGE_STEPS:-EDGE_STEPS]


def load_listener(run: Path) -> Listener:
    state = torch.load(run / "listener.pt", map_location="cpu", weights_only=True)["listener"]
    listener = Listener(len(state["output.bias"]))
    listener.load_state_dict(state)
    return listener.eval().requires_grad_(False)


class LabelledCrops:
    """Random crops of recorded speech with the sound of every 10 ms."""

    def __init__(self, speech: Speech, indices, rng):
        self.speech, self.rng = speech, rng
        self.indices = [i for i in indices if speech.num_frames(i) >= CROP_FRAMES]

    def batch(self):
        audio, labels = [], []
        for index in self.rng.choice(self.indices, BATCH):
            start = self.rng.integers(self.speech.num_frames(index) - CROP_FRAMES + 1)
            samples = self.speech.samples(index)
            per_frame = FRAME_SAMPLES // MEL_HOP_SAMPLES
            audio.append(samples[start * FRAME_SAMPLES :][: CROP_FRAMES * FRAME_SAMPLES])
            steps = self.speech.labels(index, MEL_HOP_SAMPLES)
            labels.append(steps[start * per_frame :][: CROP_FRAMES * per_frame])
        return torch.from_numpy(np.stack(audio)), torch.from_numpy(np.stack(labels))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--minutes", type=float, default=4)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.manual_seed(0)
    speech = Speech(args.run)
    listener = Listener(len(speech.sounds)).to(args.device)
    optimizer = torch.optim.AdamW(listener.parameters(), lr=2e-3, betas=(0.9, 0.98))
    states = {"listener": listener, "optimizer": optimizer}
    training = Training(args.run, "listener", args.minutes, states)
    crops = LabelledCrops(speech, speech.train, np.random.default_rng(training.step))
    held_out = LabelledCrops(speech, speech.validation, np.random.default_rng(12345))

    def loss_of(audio, labels):
        logits = inner(listener(audio.to(args.device))[1]).flatten(0, 1)
        labels = inner(labels.to(args.device)).flatten()
        right = (logits.argmax(1) == labels)[labels >= 0].float().mean()
        return F.cross_entropy(logits, labels, ignore_index=-100), right

    for _ in training.steps():
        loss, right = loss_of(*crops.batch())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        training.log(loss=loss.detach(), right=right)
    listener.eval()
    with torch.no_grad():
        rows = torch.tensor([loss_of(*held_out.batch()) for _ in range(20)])
    loss, right = rows.mean(0)
    training.record(val_loss=loss, val_right=right)


if __name__ == "__main__":
    main()
