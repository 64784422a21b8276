"""Step 8: have an independent recogniser listen.

    python evaluate.py codec RUN                         recorded speech through the codec's codes
    python evaluate.py lm RUN [--temperature 0.6]        the test sentences, made from text

Prints, and appends to RUN/evaluation.jsonl: word error rate of Whisper tiny.en, share of sentences
without an error, DNSMOS, median F0, sentences that did not end by themselves, real-time factor.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import soundfile
import torch
from codec import decoder_states
from common import SAMPLE_RATE_HZ, Speech
from encode_speech import encode, load_stage1
from judge import Judge
from lm import generate, make_config, make_model
from teacher import Teacher
from texts import TEST_SENTENCES
from tokenizers import Tokenizer
from transformers import MimiModel


@torch.no_grad()
def decode(codec: MimiModel, codes) -> np.ndarray:
    """int [frames, K] -> float32 [S]"""
    if len(codes) == 0:
        return np.zeros(SAMPLE_RATE_HZ // 10, np.float32)
    codes = torch.as_tensor(np.asarray(codes), dtype=torch.int64).clamp(max=511).T[None]
    states = decoder_states(codec, codec.quantizer.decode(codes))
    return codec.decoder.decoder_seanet(states.transpose(1, 2))[0, 0].numpy()


def report(run: Path, results: dict, texts, heard, show: int):
    print(json.dumps(results), flush=True)
    with open(run / "evaluation.jsonl", "a") as log:
        log.write(json.dumps(results) + "\n")
    for text, transcript in list(zip(texts, heard, strict=True))[:show]:
        print(f"    {text}\n      -> {transcript}", flush=True)


def evaluate_codec(args, judge):
    codec = MimiModel.from_pretrained(args.run / "codec").eval()
    stage1 = load_stage1(args.run, codec.config.num_quantizers)
    teacher = Teacher()
    texts = TEST_SENTENCES[: args.sentences]
    for speaker in (0, 1):
        audios, references = [], []
        for seed, text in enumerate(texts):
            samples, _ = teacher.say(text, speaker, 1.0, seed)
            padded = np.pad(samples, (0, -len(samples) % 1920))
            if args.own_encoder:
                with torch.no_grad():
                    codes = codec.encode(torch.from_numpy(padded)[None, None]).audio_codes[0].T
            else:
                codes = encode(stage1, [padded], "cpu")[0]
            audios.append(decode(codec, codes))
            references.append(samples)
        for what, sounds in (("teacher", references), ("codec", audios)):
            if what == "teacher" and args.own_encoder:
                continue
            scores = judge.score(texts, sounds, quality=not args.quick)
            heard = scores.pop("heard")
            what = "own encoder" if args.own_encoder else what
            report(args.run, dict(what=what, speaker=speaker, **scores), texts, heard, args.show)
        soundfile.write(args.run / f"codec_speaker{speaker}.wav", audios[0], SAMPLE_RATE_HZ)


def load_lm(run: Path, name: str):
    tokenizer = Tokenizer.from_file(str(run / "tokenizer.json"))
    codec = MimiModel.from_pretrained(run / "codec").eval()
    model = make_model(make_config(codec.config, tokenizer)).eval()
    saved = torch.load(run / f"{name}.pt", map_location="cpu", weights_only=True)
    state = {
        key.removeprefix("model."): tensor
        for key, tensor in saved["language"].items()
        if key.startswith("model.")
    }
    missing, unexpected = model.load_state_dict(state, strict=False)
    lost = [key for key in missing if not key.startswith("codec_model")]
    assert not lost + unexpected, lost + unexpected
    model.codec_model = codec
    return model, tokenizer, saved


def evaluate_lm(args, judge):
    model, tokenizer, saved = load_lm(args.run, args.name)
    if args.training_texts:
        rows = Speech(args.run, 1).rows
        texts = [row["text"] for row in rows if len(row["text"].split()) > 3][: args.sentences]
    else:
        texts = TEST_SENTENCES[: args.sentences]
    for speaker in (0, 1):
        torch.manual_seed(args.seed)
        prompts = [tokenizer.encode(f"[{speaker}]{text}").ids for text in texts]
        started = time.time()
        streams, ended = generate(model, prompts, args.temperature, args.top_k)
        audios = [decode(model.codec_model, codes) for codes in streams]
        made_s = sum(len(codes) for codes in streams) / 12.5
        scores = judge.score(texts, audios, quality=not args.quick)
        heard = scores.pop("heard")
        results = dict(
            what="training texts" if args.training_texts else "test texts",
            name=args.name,
            step=saved["step"],
            speaker=speaker,
            temperature=args.temperature,
            sentences=len(texts),
            **scores,
            unended=int((~ended).sum()),
            speech_s=round(made_s, 1),
            rtf_batched=round((time.time() - started) / max(made_s, 0.1), 3),
        )
        report(args.run, results, texts, heard, args.show)
        for index in range(min(5, len(audios))):
            path = args.run / f"{args.name}_speaker{speaker}_{index}.wav"
            soundfile.write(path, audios[index], SAMPLE_RATE_HZ)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["codec", "lm"])
    parser.add_argument("run", type=Path)
    parser.add_argument("--name", default="lm")
    parser.add_argument("--sentences", type=int, default=50)
    parser.add_argument("--temperature", type=float, default=0.6)
    parser.add_argument("--top-k", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--training-texts", action="store_true")
    parser.add_argument("--own-encoder", action="store_true", help="codec: SEANet, not mel")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="no DNSMOS")
    parser.add_argument("--show", type=int, default=5, help="transcripts to print")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    judge = Judge(args.threads)
    (evaluate_codec if args.what == "codec" else evaluate_lm)(args, judge)


if __name__ == "__main__":
    main()
