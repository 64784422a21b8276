"""Step 4: encode the speech, and write the codec's checkpoint with K codebooks.

    python encode_speech.py RUN --codebooks 7 [--device cpu]
    python encode_speech.py RUN --warm-start VOICE

Writes RUN/codec/, a transformers MimiModel whose convolution stacks are still untrained, and
RUN/codes.npz with the codes of all utterances, int16 [frames, K], and `ends`, the end frame of each
utterance. The stop frame's code is reserved first, so no utterance uses code 0 of codebook 0.

`--warm-start VOICE` takes the encoder and the codebooks of an earlier voice instead of those of
train_codes.py, so that its language model knows the codes. If that voice has no pulse codes, they
are added; its encoder learns to guess them.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from transformers import MimiModel

from codec import (
    CODEBOOK_SIZE,
    CONTENT_DIM,
    PULSE_BOOK,
    Stage1,
    adopt_codes,
    content_books,
    install_pulses,
    keep_pulses,
    load_codec,
    log_mel,
    make_config,
    reserve_stop_code,
)
from common import Speech, autocast, wait_while_paused
from vox_serve.loading import load_engine
from warm_start import fit_pulses

BATCH = 32
FIT_UTTERANCES = 60


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
    kept = MimiModel.from_pretrained(folder).quantizer.state_dict()
    for name, tensor in codec.quantizer.state_dict().items():
        if name.endswith("input_proj.weight"):  # of the encoder; the last bits of a fit may differ
            continue
        if name not in kept or not torch.equal(kept[name].cpu(), tensor.cpu()):
            raise ValueError(f"{folder} is of other codes ({name}): move it and codes.npz away")


def earlier_codec(voice: Path, speech: Speech) -> MimiModel:
    """An untrained codec with the encoder and the codes of an earlier voice, and pulse codes."""
    earlier = load_codec(voice)
    codec = MimiModel(make_config(1 + len(content_books(earlier))))
    install_pulses(codec)
    adopt_codes(codec, earlier)
    reserve_stop_code(codec)
    codec.eval()
    if earlier.config.codebook_dim == CONTENT_DIM:
        fit_pulses(codec, speech, speech.train[:FIT_UTTERANCES])
    return codec


def encode_as(mimi, batch: list[np.ndarray], pulses: list[np.ndarray]) -> list[np.ndarray]:
    """Like `encode`, with the codec of vox_serve, which is faster than transformers'. It is causal,
    so the silence after the shorter utterances does not change their codes."""
    length = max(len(samples) for samples in batch)
    audio = torch.stack([torch.from_numpy(np.pad(s, (0, length - len(s)))) for s in batch])
    made = []
    for codes, known in zip(mimi.encode(audio).numpy(), pulses, strict=True):
        books = list(codes[: len(known)].T)
        if mimi.config.codebook_dim > CONTENT_DIM:
            del books[PULSE_BOOK]
        books.insert(PULSE_BOOK, known)
        made.append(np.stack(books, 1).astype(np.int16))
    return made


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--codebooks", type=int, default=7)
    parser.add_argument("--parts", type=int, help="use only this many parts of the speech")
    parser.add_argument("--warm-start", type=Path, metavar="VOICE", help="keep this voice's codes")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.manual_seed(0)  # the same codec each time
    speech, path = Speech(args.run, args.parts), args.run / "codes.npz"
    if args.warm_start:
        codec = earlier_codec(args.warm_start, speech)
        mimi = load_engine(str(args.warm_start), device="cpu", dtype="float32").mimi
        phones_path = args.run / "phones.txt"
        if not phones_path.exists():  # otherwise train_codes.py writes it
            phones_path.write_text("\n".join(speech.phones()))

        def encode_batch(samples, pulses):
            return encode_as(mimi, samples, pulses)
    else:
        model = load_stage1(args.run, args.codebooks).to(args.device)
        codec = model.codec

        def encode_batch(samples, pulses):
            return encode(model, samples, pulses, args.device)

    begun = (args.run / "codec").exists()
    write_codec(codec, args.run / "codec")
    codes = [None] * len(speech.rows)
    if args.warm_start and begun and path.exists():  # of fewer parts, by this codec
        known = np.load(path)
        count = min(len(known["ends"]), len(codes))
        codes[:count] = np.split(known["codes"], known["ends"][:-1])[:count]
    order = sorted((i for i, c in enumerate(codes) if c is None), key=speech.num_frames)
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
    np.savez(path, codes=stream, ends=ends)
    print(f"{len(stream)} frames, {len(stream) / 12.5 / 3600:.2f} h")
    for k in range(stream.shape[1]):
        share = np.bincount(stream[:, k], minlength=CODEBOOK_SIZE) / len(stream)
        share = share[share > 0]
        bits = -(share * np.log2(share)).sum()
        print(f"codebook {k}: {len(share)} codes used, {bits:.2f} bits")
    assert (stream[:, 0] > 0).all()


if __name__ == "__main__":
    main()
