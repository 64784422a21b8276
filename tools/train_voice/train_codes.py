"""Step 2 (codec stage 1): learn the codes on log-mel spectrograms.

    python train_codes.py RUN [--minutes 27] [--codebooks 7] [--device cpu]

Trains the parts of Mimi that run at 25 Hz or 12.5 Hz: encoder transformer, quantizer, decoder
transformer. A mel front-end and a mel head replace the two convolution stacks, which makes this
about ten times cheaper than end-to-end training. Codebook 0 is trained only to classify the phone
of every 20 ms, so that it becomes phonetic, which is easiest for the language model. The codebooks
start from k-means on latents that were trained without quantization; after that the encoder's
learning rate is lower, since the codebooks could not follow otherwise. In the last part of the run
(FIXED_SHARE) encoder and codes do not change: refit_codes.py has fitted the codebooks once more,
and only what decodes them is trained.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from codec import (
    Stage1,
    content,
    decoder_states,
    init_codebooks,
    keep_pulses,
    log_mel,
    make_config,
    parts,
    pulse_vectors,
    rvqs,
    train_quantize,
)
from common import FRAME_SAMPLES, SOUNDS_FILE, Speech, Training, autocast
from refit_codes import refit

BATCH = 8
WINDOW_FRAMES = 40
LABEL_SAMPLES = 480
WARM_STEPS = 250  # continuous latents before the codebooks start
ENCODER_SLOWDOWN = 0.2
PHONE_WEIGHT = 1.0
COMMITMENT_WEIGHT = 0.5
SLOPE_WEIGHT = 0.5
FIXED_SHARE = 0.25  # of the run: the encoder and the codes do not change any more
REFIT_BATCHES = 500


class Windows:
    """Random windows of the recorded stream, with a phone label every 20 ms."""

    def __init__(self, speech: Speech, rng):
        self.speech, self.rng = speech, rng
        self.starts = [i for i in speech.train if speech.num_frames(i) > 4]

    def window(self):
        """Consecutive utterances, cut at a random frame: float32 [S], labels int64 [S / 480],
        pulse codes int64 [S / 1920]."""
        audio, labels, pulses, length = [], [], [], 0
        while length < 2 * WINDOW_FRAMES * FRAME_SAMPLES:
            index = self.starts[self.rng.integers(len(self.starts))]
            samples = self.speech.samples(index)
            audio.append(samples)
            pulses.append(self.speech.pulses(index))
            labels.append(self.speech.labels(index, LABEL_SAMPLES))
            length += len(samples)
        cut = self.rng.integers(WINDOW_FRAMES + 1) if self.rng.random() < 0.7 else 0
        audio = np.concatenate(audio)[cut * FRAME_SAMPLES :][: WINDOW_FRAMES * FRAME_SAMPLES]
        labels = np.concatenate(labels)[cut * 4 :][: WINDOW_FRAMES * 4]
        pulses = np.concatenate(pulses)[cut:][:WINDOW_FRAMES]
        return audio, labels, pulses

    def batch(self):
        columns = zip(*(self.window() for _ in range(BATCH)), strict=True)
        return tuple(torch.from_numpy(np.stack(column)) for column in columns)


def losses(model: Stage1, audio, labels, pulses, *, quantize: bool, update=False, kept=None):
    device = audio.device.type
    mel = log_mel(audio)
    with autocast(device):
        latents = model.latents(mel)
    latents = latents.float()
    commitment = torch.zeros((), device=audio.device)
    if quantize:
        quantized, semantic, commitment, _ = train_quantize(
            model.codec, latents, update, kept, pulses
        )
    else:
        semantic, acoustic = (content(rvq.input_proj(latents)) for rvq in rvqs(model.codec))
        acoustic = acoustic + pulse_vectors(model.codec, pulses)
        semantic, acoustic = (
            rvq.output_proj(x)
            for rvq, x in zip(rvqs(model.codec), (semantic, acoustic), strict=True)
        )
        quantized = semantic + acoustic
    if not model.fixed:  # the mel loss must not pull codebook 0 away from phones
        quantized = quantized - semantic + semantic.detach()
    with autocast(device):
        predicted = model.head(decoder_states(model.codec, quantized))
        phone_logits = model.phones(semantic.transpose(1, 2))
    predicted = predicted.float()
    num_phones = phone_logits.shape[-1] // 4
    return {
        "mel": (predicted - mel).abs().mean(),
        "slope": (predicted.diff(dim=2) - mel.diff(dim=2)).abs().mean(),
        "commitment": commitment,
        "phone": F.cross_entropy(phone_logits.float().reshape(-1, num_phones), labels.reshape(-1)),
    }


@torch.no_grad()
def gather(model: Stage1, windows: Windows, count: int):
    """latents [N, C] and labels [N, 4] of `count` batches."""
    latents, labels = [], []
    for _ in range(count):
        audio, sounds, _ = windows.batch()
        found = model.latents(log_mel(audio.to(model.phones.weight.device)))
        latents.append(found.transpose(1, 2).flatten(0, 1).cpu())
        labels.append(sounds.view(-1, 4))
    return torch.cat(latents), torch.cat(labels)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--minutes", type=float, default=27)
    parser.add_argument("--codebooks", type=int, default=7)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.manual_seed(0)
    speech = Speech(args.run)
    model = Stage1(make_config(args.codebooks), len(speech.sounds)).to(args.device)
    untrained = model.seanet_names()
    trained = [p for n, p in model.named_parameters() if n not in untrained]
    encoder = parts(model.codec)
    before_codes = [
        *model.front.parameters(),
        *encoder.encoder_transformer.parameters(),
        *encoder.downsample.parameters(),
    ]
    before_codes += [rvq.input_proj.weight for rvq in rvqs(model.codec)]
    slow = {id(parameter) for parameter in before_codes}
    groups = [{"params": [p for p in trained if id(p) not in slow]}]
    groups += [{"params": [p for p in trained if id(p) in slow]}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01)
    training = Training(args.run, "codes", args.minutes, {"model": model, "optimizer": optimizer})
    windows = Windows(speech, np.random.default_rng(training.step))
    held_out = Windows(speech, np.random.default_rng(12345))
    held_out.starts = speech.validation
    validation = [tuple(t.to(args.device) for t in held_out.batch()) for _ in range(8)]
    keep_pulses(model.codec)

    for step in training.steps():
        if step == WARM_STEPS:
            with torch.no_grad():
                batches = [windows.batch()[0].to(args.device) for _ in range(60)]
                init_codebooks(model.codec, torch.cat([model.latents(log_mel(b)) for b in batches]))
        if training.progress > 1 - FIXED_SHARE and not model.fixed:
            refit(model.cpu(), *gather(model, windows, REFIT_BATCHES))
            model.fixed.fill_(True)
            model.to(args.device)
            training.save()
        for parameter in before_codes:
            parameter.requires_grad_(not model.fixed)
        if step > WARM_STEPS:
            optimizer.param_groups[1]["lr"] *= ENCODER_SLOWDOWN
        audio, labels, pulses = (t.to(args.device) for t in windows.batch())
        kept = None
        if torch.rand(()) < 0.5:
            kept = torch.randint(2, args.codebooks + 1, (BATCH,), device=args.device)
        quantize = step >= WARM_STEPS
        update = quantize and not model.fixed
        loss = losses(model, audio, labels, pulses, quantize=quantize, update=update, kept=kept)
        total = (
            loss["mel"]
            + SLOPE_WEIGHT * loss["slope"]
            + COMMITMENT_WEIGHT * loss["commitment"]
            + PHONE_WEIGHT * loss["phone"]
        )
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        keep_pulses(model.codec)
        training.log(**loss)

    with torch.no_grad():
        for count in sorted({4, args.codebooks}):
            kept = torch.full((BATCH,), count, device=args.device)
            rows = [losses(model, *batch, quantize=True, kept=kept) for batch in validation]
            means = {f"val{count}_{k}": torch.stack([r[k] for r in rows]).mean() for k in rows[0]}
            training.record(**means)
    (args.run / SOUNDS_FILE).write_text("\n".join(speech.sounds))


if __name__ == "__main__":
    main()
