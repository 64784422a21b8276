"""Steps 5 and 6 (codec stage 2): train the SEANet decoder as a vocoder of the codes.

    python train_vocoder.py RUN [--minutes 10]                        spectral losses
    python train_vocoder.py RUN --predicted-share 0.75                predicted codes, too
    python train_vocoder.py RUN --thaw --listener-weight 0.2          then the transformer, too
    python train_vocoder.py RUN --adversarial [--minutes 20]          or with a discriminator

A plain run trains only the SEANet decoder. The states that it reads are whitened (without that it
learns nothing: some channels vary a hundred times more than others), and the whitening is folded
into the first convolution when RUN/codec is written.
The runs with `--thaw` and `--adversarial` start from the plain one, train the upsampling and the
transformer, too; no plain run can follow. `--listener-weight` adds two losses that the classifier
of listener.py computes. An adversarial run has a small multi-scale STFT discriminator (EnCodec,
section 3.4), which judges texture, and a small multi-period one (HiFi-GAN, section 2.3), which
judges pitch, both with feature matching.
With `--predicted-share`, that share of the batches has the codes that predict_codes.py wrote, while
the waveform stays the teacher's: the decoder learns to speak clearly from the language model's
codes, whose fine structure is often not the speech's (Tacotron 2, section 3.1, does the same).
"""

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm
from transformers import MimiModel

from codec import (
    MEL_HOP_SAMPLES,
    PULSE_BOOK,
    decoder_states,
    keep_pulses,
    load_codec,
    mel_filters,
    parts,
)
from common import FRAME_SAMPLES, Speech, Training, autocast
from discriminators import PeriodDiscriminator, ScaleDiscriminator
from listener import inner, load_listener
from pulse_codes import PULSE_DIM
from warm_start import fit_first, utterance_pairs
from wires import carry_pulses

BATCH = 3
UNTRAINED_LEVEL = 0.1  # speech's level from the start, or 100 steps go by on that alone
CROP_FRAMES = 12
CONTEXT_FRAMES = 3  # real history before the crop: heard by the decoder, not by the losses
HISTORY_FRAMES = 50
STATE_SAMPLES = FRAME_SAMPLES // 2
SCALES = ((2048, 128), (512, 60), (128, 15))  # n_fft, mel bins
COMPLEX_SCALES = (2048, 512)
ADVERSARIAL_WEIGHT = 0.2
FEATURE_WEIGHT = 1.0
CONTEXT_LR = 0.3  # of the thawed transformer, relative to the SEANet decoder's
WINDOWS = (1024, 512)
PERIODS = (2, 3, 5, 7, 11)
VOICED_TOP_HZ = 4000.0  # above, the weight of voiced_loss falls


class Vocoder(nn.Module):
    """Whitening and the SEANet decoder, weight-normed; `level` scales the waveform."""

    def __init__(self, seanet, dim: int, level: float = 1.0):
        super().__init__()
        self.seanet = seanet
        self.mean, self.whitening = nn.Buffer(torch.zeros(dim)), nn.Buffer(torch.eye(dim))
        for layer in self.convs():
            weight_norm(layer)
        with torch.no_grad():
            self.convs()[-1].parametrizations.weight.original0.mul_(level)

    def convs(self):
        kinds = (nn.Conv1d, nn.ConvTranspose1d)
        return [layer for layer in self.seanet.modules() if isinstance(layer, kinds)]

    def forward(self, states):
        """[B, T, C] -> [B, 1, 960 T]"""
        return self.seanet(((states - self.mean) @ self.whitening).transpose(1, 2))

    @torch.no_grad()
    def set_whitening(self, states):
        """From states [N, C]. The ratio of the largest to the smallest deviation along an axis
        becomes its square root, since the weakest axes are mostly noise. The pulse channels stay as
        they are: the wires read them."""
        content = states[:, :-PULSE_DIM]
        deviations = content.std(0).clamp(min=1e-3)
        self.mean[:-PULSE_DIM] = content.mean(0)
        variances, axes = torch.linalg.eigh(torch.cov((content / deviations).T))
        scales = variances.clamp(min=1e-3) ** -0.25
        scales = scales / (variances * scales**2).mean().sqrt()
        size = len(deviations)
        self.whitening[:size, :size] = (axes * scales) @ axes.T / deviations[:, None]

    @torch.no_grad()
    def folded(self):
        """The SEANet decoder that reads raw states; self is of no more use for training."""
        for layer in self.convs():
            parametrize.remove_parametrizations(layer, "weight")
        first = self.convs()[0]
        scaled = torch.einsum("cd,odk->ock", self.whitening, first.weight)
        first.bias -= (scaled * self.mean[None, :, None]).sum((1, 2))
        first.weight.copy_(scaled)
        return self.seanet


class SpectralLoss(nn.Module):
    """L1 between log-mel and log-linear magnitudes at several resolutions."""

    def __init__(self):
        super().__init__()
        for n_fft, bins in SCALES:
            self.register_buffer(f"window{n_fft}", torch.hann_window(n_fft))
            self.register_buffer(f"mel{n_fft}", mel_filters(n_fft, bins))

    def forward(self, made, real):
        total = 0.0
        for n_fft, _ in SCALES:
            window, mel = getattr(self, f"window{n_fft}"), getattr(self, f"mel{n_fft}")
            both = torch.cat([made, real]).squeeze(1)
            spectrum = torch.stft(both, n_fft, n_fft // 4, window=window, return_complex=True)
            # White noise of RMS s has magnitude s, so the floors below are levels.
            spectrum = torch.view_as_real(spectrum / window.square().sum().sqrt())
            a, b = spectrum.square().sum(-1).add(1e-8).sqrt().chunk(2)
            log_mels = [torch.log(mel @ x + 1e-3) for x in (a, b)]
            total = total + F.l1_loss(*log_mels)
            total = total + 0.3 * F.l1_loss(a, b) / (b.mean() + 1e-4)
            total = total + 0.3 * F.l1_loss(torch.log(a + 3e-3), torch.log(b + 3e-3))
        return total / len(SCALES)


def complex_loss(made, real):
    """L1 between complex spectra, relative to the mean of the real one; 1 for silence."""
    total = 0.0
    for n_fft in COMPLEX_SCALES:
        window = torch.hann_window(n_fft, device=made.device)
        both = torch.cat([made, real]).squeeze(1)
        spectrum = torch.stft(both, n_fft, n_fft // 4, window=window, return_complex=True)
        a, b = torch.view_as_real(spectrum).chunk(2)
        total = total + F.l1_loss(a, b) / (b.abs().mean() + 1e-3)
    return total / len(COMPLEX_SCALES)


def voiced_loss(made, real, voiced):
    """Like `complex_loss`, for the samples where `voiced` [B, S] is 1, with compressed magnitudes
    (a square root, as in Braun and Tashev 2021), or weak harmonics would count for nothing."""
    total = 0.0
    for n_fft in COMPLEX_SCALES:
        hop = n_fft // 4
        window = torch.hann_window(n_fft, device=made.device)
        both = torch.cat([made, real]).squeeze(1)
        spectrum = torch.stft(both, n_fft, hop, window=window, return_complex=True)
        spectrum = torch.view_as_real(spectrum / window.square().sum().sqrt())
        magnitude = spectrum.square().sum(-1, keepdim=True).add(1e-4).sqrt()
        a, b = (spectrum / magnitude.sqrt()).chunk(2)
        freqs_hz = torch.arange(n_fft // 2 + 1, device=made.device) * 24000 / n_fft
        frames = F.max_pool1d(voiced[:, None], hop)
        frames = F.pad(frames, (0, a.shape[2] - frames.shape[2]))
        weight = (VOICED_TOP_HZ / freqs_hz.clamp(min=VOICED_TOP_HZ))[:, None] * frames
        distance, size = (x.square().sum(-1).add(1e-8).sqrt() for x in (a - b, b))
        total = total + (distance * weight).sum() / ((size * weight).sum() + 1)
    return total / len(COMPLEX_SCALES)


def listener_losses(listener, made, real, labels):
    """Two losses of the speech `made` [B, 1, S], as the listener (listener.py) hears it: the cross
    entropy of the sounds `labels` [B, S / 240], and the L1 distance of its features from those of
    the recording `real`, relative to their size."""
    features, logits = listener(torch.cat([made, real]).squeeze(1))
    sounds = F.cross_entropy(
        inner(logits.chunk(2)[0]).flatten(0, 1), inner(labels).flatten(), ignore_index=-100
    )
    distance = 0.0
    for layer in features:
        a, b = inner(layer.transpose(1, 2)).chunk(2)
        distance = distance + F.l1_loss(a, b) / b.abs().mean()
    return sounds, distance / len(features)


class Crops:
    """Random crops of utterances as (codes with their history, samples, sounds); in a share of the
    batches the codes are predicted ones. Speaker 0 speaks in `speaker0_share` of them."""

    def __init__(self, run, speech: Speech, predicted_share=0.0, speaker0_share=0.5):
        saved = np.load(run / "codes.npz")
        self.codes, self.ends = saved["codes"], saved["ends"]
        self.speech, self.rng = speech, np.random.default_rng(0)
        lengths = np.diff(self.ends, prepend=0)
        speech.train = [i for i in speech.train if i < len(lengths)]  # what is encoded
        long = [i for i in speech.train if lengths[i] >= CROP_FRAMES]

        def by_speaker(indices):
            speakers = np.array([speech.rows[i]["speaker"] for i in indices])
            return [np.array(indices)[speakers == speaker] for speaker in (0, 1)]

        self.speaker0_share = speaker0_share
        self.indices, self.lengths = by_speaker(long), lengths
        self.predicted_share, self.predicted = predicted_share, None
        if predicted_share:
            saved = np.load(run / "predicted.npz")
            made, first = saved["codes"], int(saved["first"])
            start = int(self.ends[first - 1]) if first else 0
            end = start + len(made)
            books = slice(PULSE_BOOK + 1)  # these are not predicted
            if not np.array_equal(self.codes[start:end, books], made[:, books]):
                raise ValueError(f"{run}/predicted.npz is of other codes: run predict_codes.py")
            self.predicted = self.codes.copy()
            self.predicted[start:end] = made
            inside = [i for i in long if i >= first and self.ends[i] <= end]
            self.predicted_indices = by_speaker(inside)

    def batch(self):
        """codes [B, HISTORY, K], valid [B] frames of them, samples [B, 1, S], and the sound of
        every 10 ms [B, S / 240]."""
        codes = np.zeros((BATCH, HISTORY_FRAMES, self.codes.shape[1]), np.int64)
        audio = np.zeros((BATCH, 1, CROP_FRAMES * FRAME_SAMPLES), np.float32)
        valid = np.zeros(BATCH, np.int64)
        steps = FRAME_SAMPLES // MEL_HOP_SAMPLES
        sounds = np.zeros((BATCH, CROP_FRAMES * steps), np.int64)
        stream, indices = self.codes, self.indices
        if self.predicted is not None and self.rng.random() < self.predicted_share:
            stream, indices = self.predicted, self.predicted_indices
        for row in range(BATCH):
            speaker = int(self.rng.random() >= self.speaker0_share)
            index = self.rng.choice(indices[speaker])
            length = self.lengths[index]
            end = self.rng.integers(CROP_FRAMES, length + 1)
            start = max(0, end - HISTORY_FRAMES)
            first = self.ends[index] - length
            valid[row] = end - start
            codes[row, : end - start] = stream[first + start : first + end]
            samples = self.speech.samples(index)
            audio[row, 0] = samples[(end - CROP_FRAMES) * FRAME_SAMPLES : end * FRAME_SAMPLES]
            spoken = self.speech.labels(index, MEL_HOP_SAMPLES)
            sounds[row] = spoken[(end - CROP_FRAMES) * steps : end * steps]
        return tuple(torch.from_numpy(array) for array in (codes, valid, audio, sounds))


def crop_states(codec: MimiModel, codes, valid):
    """Decoder states of each crop after CONTEXT_FRAMES of history; zeros before the utterance."""
    with torch.no_grad():
        quantized = codec.quantizer.decode(codes.transpose(1, 2))
    with autocast(codes.device.type):
        states = decoder_states(codec, quantized)
    states = F.pad(states.float(), (0, 0, 2 * CONTEXT_FRAMES, 0))
    count = 2 * (CONTEXT_FRAMES + CROP_FRAMES)
    starts = 2 * (valid - CROP_FRAMES)
    rows = starts[:, None] + torch.arange(count, device=codes.device)
    return states.gather(1, rows[..., None].expand(-1, -1, states.shape[2]))


def voiced_samples(codes, valid):
    """Per crop: 1 in the frames with a pulse code, else 0, float32 [B, S]."""
    rows = (valid - CROP_FRAMES)[:, None] + torch.arange(CROP_FRAMES, device=codes.device)
    pulses = codes[..., PULSE_BOOK].gather(1, rows)
    return (pulses > 0).float().repeat_interleave(FRAME_SAMPLES, 1)


def set_trainable(module, value: bool):
    for parameter in module.parameters():
        parameter.requires_grad_(value)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--lr", type=float, help="1.5e-3; with --thaw or --adversarial 6e-4")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--adversarial", action="store_true", help="thaw, and add discriminators")
    kind.add_argument("--thaw", action="store_true", help="train the transformer, too")
    parser.add_argument("--listener-weight", type=float, default=0.0, help="see listener.py")
    parser.add_argument("--spectral-weight", type=float, default=1.0)
    parser.add_argument("--complex-weight", type=float, default=0.0, help="of the phase's loss")
    parser.add_argument("--voiced-weight", type=float, default=0.0, help="of the harmonics' phase")
    parser.add_argument("--decay", type=float, default=0.5, help="last share of the run: lr falls")
    parser.add_argument("--predicted-share", type=float, default=0.0, help="of predicted codes")
    parser.add_argument("--speaker0-share", type=float, default=0.5, help="of the crops")
    parser.add_argument("--warm-start", type=Path, metavar="VOICE", help="see warm_start.py")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    later = args.adversarial or args.thaw  # starts from the plain run
    args.lr = args.lr or (6e-4 if later else 1.5e-3)
    name = "vocoder_thawed" if args.thaw else "vocoder"
    name = "vocoder_adversarial" if args.adversarial else name
    others = [path.stem for path in args.run.glob("vocoder_*.pt") if path.stem != name]
    if others:
        parser.error(f"{args.run}/{others[0]}.pt exists: continue that run, or begin without it")
    torch.manual_seed(0)
    codec = MimiModel.from_pretrained(args.run / "codec").eval()
    set_trainable(codec, False)
    crops = Crops(args.run, Speech(args.run), args.predicted_share, args.speaker0_share)
    fresh = not later and not (args.run / "vocoder.pt").exists()
    earlier = load_codec(args.warm_start) if args.warm_start and fresh else None
    if earlier is not None:
        vocoder = Vocoder(parts(earlier).decoder_seanet, codec.config.hidden_size)
    else:
        seanet = parts(MimiModel(codec.config)).decoder_seanet
        carry_pulses(seanet)
        vocoder = Vocoder(seanet, codec.config.hidden_size, UNTRAINED_LEVEL)
    if fresh:
        sample = [crop_states(codec, *crops.batch()[:2]) for _ in range(20)]
        vocoder.set_whitening(torch.cat(sample).flatten(0, 1))
    if earlier is not None:
        pairs = utterance_pairs(args.run, crops.speech.train, np.random.default_rng(0))
        explained = fit_first(vocoder, codec, earlier, pairs)
        print(f"the first convolution explains {explained:.0%} of the earlier one's output")
    codec, vocoder = codec.to(args.device), vocoder.to(args.device)
    generator = torch.optim.AdamW(vocoder.parameters(), lr=args.lr, betas=(0.8, 0.99))
    states = {"vocoder": vocoder, "generator": generator}
    if later:
        decoder = parts(codec)
        context = nn.ModuleList([decoder.upsample, decoder.decoder_transformer])
        set_trainable(context, True)
        generator.add_param_group(dict(params=context.parameters(), lr=args.lr * CONTEXT_LR))
        states["context"] = context
        start = torch.load(args.run / "vocoder.pt", map_location="cpu", weights_only=True)
        vocoder.load_state_dict(start["vocoder"])
    if args.adversarial:
        judges = nn.ModuleList(
            [ScaleDiscriminator(n) for n in WINDOWS] + [PeriodDiscriminator(n) for n in PERIODS]
        ).to(args.device)
        judge_optimizer = torch.optim.AdamW(judges.parameters(), lr=5e-4, betas=(0.8, 0.99))
        states |= {"judges": judges, "judge_optimizer": judge_optimizer}
    if args.listener_weight:
        listener = load_listener(args.run).to(args.device)
    training = Training(args.run, name, args.minutes, states, args.decay)
    crops.rng = np.random.default_rng(training.step)
    spectral = SpectralLoss().to(args.device)

    trained = [p for group in generator.param_groups for p in group["params"]]
    for _ in training.steps():
        codes, valid, real, sounds = (t.to(args.device) for t in crops.batch())
        inputs = crop_states(codec, codes, valid)
        with autocast(args.device):
            made = vocoder(inputs)
        made = made.float()[..., CONTEXT_FRAMES * FRAME_SAMPLES :]
        loss = {"spectral": spectral(made, real)}
        total = args.spectral_weight * loss["spectral"]
        if args.complex_weight:
            loss["complex"] = complex_loss(made, real)
            total = total + args.complex_weight * loss["complex"]
        if args.voiced_weight:
            loss["voiced"] = voiced_loss(made, real, voiced_samples(codes, valid))
            total = total + args.voiced_weight * loss["voiced"]
        if args.listener_weight:
            loss["sounds"], loss["heard"] = listener_losses(listener, made, real, sounds)
            total = total + args.listener_weight * (loss["sounds"] + loss["heard"])
        if args.adversarial:
            with autocast(args.device):
                for_real = [judge(real) for judge in judges]
                for_made = [judge(made.detach()) for judge in judges]
            loss["judge"] = sum(
                (1 - r[0]).square().mean() + m[0].square().mean()
                for r, m in zip(for_real, for_made, strict=True)
            ) / len(judges)
            judge_optimizer.zero_grad()
            loss["judge"].backward()
            judge_optimizer.step()
            set_trainable(judges, False)
            with autocast(args.device):
                for_made = [judge(made) for judge in judges]
            set_trainable(judges, True)
            loss["fool"] = sum((1 - m[0]).square().mean() for m in for_made) / len(judges)
            pairs = [
                F.l1_loss(m.float(), r.detach().float()) / (r.detach().float().abs().mean() + 1e-4)
                for real_out, made_out in zip(for_real, for_made, strict=True)
                for r, m in zip(real_out[1], made_out[1], strict=True)
            ]
            loss["feature"] = sum(pairs) / len(pairs)
            total = total + ADVERSARIAL_WEIGHT * loss["fool"] + FEATURE_WEIGHT * loss["feature"]
        generator.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(trained, 10.0)
        generator.step()
        if later:
            keep_pulses(codec)
        training.log(**{key: value.detach() for key, value in loss.items()})

    parts(codec).decoder_seanet.load_state_dict(vocoder.cpu().folded().state_dict())
    codec.save_pretrained(args.run / "codec")


if __name__ == "__main__":
    main()
