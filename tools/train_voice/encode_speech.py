"""Step 4: encode the speech, and write the codec's checkpoint with K codebooks.

    python encode_speech.py RUN --codebooks 7 [--device cpu]
    python encode_speech.py RUN --voice VOICE

Writes RUN/codec/, a transformers MimiModel whose convolution stacks are still untrained, and
RUN/codes.npz with the codes of all utterances, int16 [frames, K], and `ends`, the end frame of each
utterance. The stop frame's code is reserved first, so no utterance uses code 0 of codebook 0.
An existing codes.npz is continued: only the utterances that it lacks are encoded.

`--voice VOICE` encodes with the codec of an earlier voice instead, and writes RUN/earlier_codes.npz
alone: what train_lm.py and train_vocoder.py need to start from that voice.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from transformers import MimiModel

from codec import (
    CODEBOOK_SIZE,
    PULSE_BOOK,
    Stage1,
    keep_pulses,
    log_mel,
    make_config,
    reserve_stop_code,
)
from common import Speech, autocast, wait_while_paused
from vox_serve.loading import load_engine

BATCH = 32


def load_stage1(run: Path, codebooks: int | None = None) -> Stage1:
    """The trained stage 1, with only its first `codebooks` codebooks."""
    state = torch.load(run / "codes.pt", map_location="cpu", weights_only=True)["model"]
    trained = sum(key.endswith("embed_sum") for key in state)
    model = Stage1(make_config(codebooks or trained), state["phones.bias"].numel() // 4)
    untrained = model.seanet_names()
    known = {k: v for k, v in state.items() if k in model.state_dict() and k not in untrained}
    missing = set(model.load_state_dict(known, strict=False).missing_keys) - untrained
    assert not missing, missing
    keep_pulses(model.codec)  # runs of earlier versions did not
    reserve_stop_code(model.codec)
    return model.eval()


@torch.no_grad()
def encode(
    model: Stage1, batch: list[np.ndarray], pulses: list[np.ndarray], device: str
) -> list[np.ndarray]:
    """Whole utterances and their pulse codes -> codes, int16 [frames, K] each."""
    length = max(len(samples) for samples in batch)
    audio = torch.stack([torch.from_numpy(np.pad(s, (0, length - len(s)))) for s in batch])
    with autocast(device):
        latents = model.latents(log_mel(audio.to(device)))
    codes = model.codec.quantizer.encode(latents.float()).permute(1, 2, 0).cpu().numpy()
    codes = [c[: len(p)].astype(np.int16) for c, p in zip(codes, pulses, strict=True)]
    for item, known in zip(codes, pulses, strict=True):
        item[:, PULSE_BOOK] = known
    return codes


def write_codec(codec: MimiModel, folder: Path):
    """Keeps an existing folder, whose decoder may be trained, if it has the same quantizer."""
    if not folder.exists():
        codec.save_pretrained(folder)
        return
    kept, made = (c.quantizer.state_dict() for c in (MimiModel.from_pretrained(folder), codec))
    for name, tensor in made.items():
        if name.endswith("input_proj.weight"):  # of the encoder; the last bits of a fit may differ
            continue
        same = kept.keys() == made.keys() and torch.equal(kept[name].cpu(), tensor.cpu())
        if not same:
            raise ValueError(f"{folder} is of other codes ({name}): move it and codes.npz away")


def known_codes(path: Path, pulses: list[np.ndarray]) -> list[np.ndarray | None]:
    """The codes of each utterance in a codes.npz, None for those that it lacks.

    `pulses` are the pulse codes of all utterances: codes with others are of other speech.
    """
    if not path.exists():
        return [None] * len(pulses)
    saved = np.load(path)
    found = np.split(saved["codes"], saved["ends"][:-1])
    found += [None] * (len(pulses) - len(found))
    return [
        codes if codes is not None and np.array_equal(codes[:, PULSE_BOOK], known) else None
        for codes, known in zip(found, pulses, strict=True)
    ]


def encode_as(mimi, batch: list[np.ndarray], pulses: list[np.ndarray]) -> list[np.ndarray]:
    """Like `encode`, with the codec of vox_serve, which is faster than transformers'. It is causal,
    so the silence after the shorter utterances does not change their codes."""
    length = max(len(samples) for samples in batch)
    audio = torch.stack([torch.from_numpy(np.pad(s, (0, length - len(s)))) for s in batch])
    made = []
    for codes, known in zip(mimi.encode(audio).numpy(), pulses, strict=True):
        codes = codes[: len(known)].astype(np.int16)
        codes[:, PULSE_BOOK] = known
        made.append(codes)
    return made


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--codebooks", type=int, default=7)
    parser.add_argument("--parts", type=int, help="use only this many parts of the speech")
    parser.add_argument("--voice", type=Path, help="encode as this voice does")
    parser.add_argument("--codec-only", action="store_true", help="write RUN/codec, encode nothing")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.manual_seed(0)  # the same codec each time
    speech, path = Speech(args.run, args.parts), args.run / "codes.npz"
    if args.voice:
        path = args.run / "earlier_codes.npz"
        mimi = load_engine(str(args.voice), device="cpu", dtype="float32").mimi

        def encode_batch(samples, pulses):
            return encode_as(mimi, samples, pulses)
    else:
        model = load_stage1(args.run, args.codebooks).to(args.device)
        if path.exists() and not (args.run / "codec").exists():
            raise ValueError(f"{path} has no codec beside it: move it away")
        write_codec(model.codec, args.run / "codec")
        if args.codec_only:
            return

        def encode_batch(samples, pulses):
            return encode(model, samples, pulses, args.device)

    codes = [None] * len(speech.rows)
    if not args.voice:
        codes = known_codes(path, [speech.pulses(i) for i in range(len(codes))])
    order = [index for index, known in enumerate(codes) if known is None]
    order.sort(key=speech.num_frames)
    for start in range(0, len(order), BATCH):
        wait_while_paused()
        indices = order[start : start + BATCH]
        encoded = encode_batch(
            [speech.samples(i) for i in indices], [speech.pulses(i) for i in indices]
        )
        for index, item in zip(indices, encoded, strict=True):
            codes[index] = item
        if start // BATCH % 50 == 0:
            print(f"{start}/{len(order)}", flush=True)
    ends = np.cumsum([len(item) for item in codes])
    stream = np.concatenate(codes)
    unfinished = path.with_suffix(".tmp.npz")
    np.savez(unfinished, codes=stream, ends=ends)
    unfinished.rename(path)
    print(f"{len(stream)} frames, {len(stream) / 12.5 / 3600:.2f} h")
    for k in range(stream.shape[1]):
        share = np.bincount(stream[:, k], minlength=CODEBOOK_SIZE) / len(stream)
        share = share[share > 0]
        bits = -(share * np.log2(share)).sum()
        print(f"codebook {k}: {len(share)} codes used, {bits:.2f} bits")
    assert (stream[:, 0] > 0).all()


if __name__ == "__main__":
    main()
