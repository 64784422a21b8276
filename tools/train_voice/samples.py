"""Makes the samples of docs/models.md: sentences as WAV files, and a spectrogram.

    python samples.py CHECKPOINT OUT

Writes speaker0_1.wav to speaker1_5.wav, made with the server's default settings, and
spectrogram.png with the first sample of each speaker, to OUT.
"""

import argparse
from pathlib import Path

import numpy as np

from codec import log_mel
from common import SAMPLE_RATE_HZ
from texts import TEST_SENTENCES
from vox_serve.audio import pcm16, wav_file
from vox_serve.engine import Request
from vox_serve.loading import load_engine
from vox_serve.sampling import SamplingParams
from vox_serve.say import speak
from voxkern.console import quiet_on_closed_pipe

SENTENCES = [TEST_SENTENCES[i] for i in (0, 11, 16, 29, 47)]


def draw_spectrograms(audios, path: Path):
    import matplotlib
    import torch

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(audios), figsize=(9, 4.5), sharex=True, sharey=True)
    for speaker, (axis, audio) in enumerate(zip(axes, audios, strict=True)):
        whole = audio[: len(audio) // 960 * 960]
        mel = log_mel(torch.from_numpy(whole)[None])[0].numpy()
        axis.imshow(
            mel, origin="lower", aspect="auto", extent=(0, len(whole) / SAMPLE_RATE_HZ, 0, len(mel))
        )
        axis.set(ylabel="mel bin", title=f"speaker {speaker}: {SENTENCES[0]}")
    axes[-1].set(xlabel="seconds")
    figure.tight_layout()
    figure.savefig(path, dpi=90)


@quiet_on_closed_pipe()
def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    engine = load_engine(args.checkpoint, device="cpu")
    first_audios = []
    for speaker in (0, 1):
        for number, text in enumerate(SENTENCES, 1):
            request = Request(
                text=text, speaker=speaker, sampling=SamplingParams(seed=number), max_frames=200
            )
            audio = speak(engine, request).audio
            name = f"speaker{speaker}_{number}.wav"
            (args.out / name).write_bytes(wav_file(pcm16(audio).tobytes(), SAMPLE_RATE_HZ))
            print(name, text)
            if number == 1:
                first_audios.append(np.asarray(audio))
    draw_spectrograms(first_audios, args.out / "spectrogram.png")


if __name__ == "__main__":
    main()
