"""Step 8: score speech with an independent recogniser.

    python evaluate.py codec RUN                         the teacher's speech through the codec
    python evaluate.py voice RUN/export                  the test sentences, spoken by vox_serve
    python evaluate.py voice RUN/export --quantize int4  with packed weights
    python evaluate.py long RUN/export                   100 sentences of 20 to 30 words
    python evaluate.py questions RUN/export              how pitch ends, by punctuation

Prints and appends to RUN/evaluation.jsonl: Whisper tiny.en's word error rate, share of sentences
without an error, DNSMOS, median F0, sentences that reached the length limit, real-time factor.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import soundfile
import torch
from transformers import MimiModel

from codec import decoder_states, parts
from common import SAMPLE_RATE_HZ, Speech, wait_while_paused
from encode_speech import encode, load_stage1
from judge import Judge, final_rise
from texts import QUESTIONS, STATEMENTS, TEST_SENTENCES, long_test_sentences
from vox_serve.config import Config
from vox_serve.csm_weights import PACKINGS
from vox_serve.engine import Request
from vox_serve.loading import load_engine
from vox_serve.long_form import LongForm
from vox_serve.sampling import SamplingParams
from vox_serve.say import speak
from voxkern.console import quiet_on_closed_pipe

MAX_FRAMES = 200  # 16 s: far longer than any of the sentences


@torch.no_grad()
def decode(codec: MimiModel, codes) -> np.ndarray:
    """int [frames, K] -> float32 [S]"""
    if len(codes) == 0:
        return np.zeros(SAMPLE_RATE_HZ // 10, np.float32)
    codes = torch.as_tensor(np.asarray(codes), dtype=torch.int64).clamp(max=511).T[None]
    states = decoder_states(codec, codec.quantizer.decode(codes))
    return parts(codec).decoder_seanet(states.transpose(1, 2))[0, 0].numpy()


def report(run: Path, results: dict, texts, heard, show: int):
    print(json.dumps(results), flush=True)
    with open(run / "evaluation.jsonl", "a") as log:
        log.write(json.dumps(results) + "\n")
    for text, transcript in list(zip(texts, heard, strict=True))[:show]:
        print(f"    {text}\n      -> {transcript}", flush=True)


def evaluate_codec(args, judge):
    codec = MimiModel.from_pretrained(args.folder / "codec").eval()
    stage1 = None if args.own_encoder else load_stage1(args.folder, codec.config.num_quantizers)
    from teacher import Teacher

    teacher = Teacher()
    texts = TEST_SENTENCES[: args.sentences]
    for speaker in (0, 1):
        audios, references = [], []
        for seed, text in enumerate(texts):
            wait_while_paused()
            samples, _, pulses = teacher.say(text, speaker, 1.0, seed)
            if stage1 is not None:
                codes = encode(stage1, [samples], [pulses], "cpu")[0]
            else:
                with torch.no_grad():
                    codes = codec.encode(torch.from_numpy(samples)[None, None]).audio_codes[0].T
                codes = codes[: len(pulses)]
            audios.append(decode(codec, codes))
            references.append(samples)
        for what, sounds in (("teacher", references), ("codec", audios)):
            if what == "teacher" and args.own_encoder:
                continue
            scores = judge.score(texts, sounds, quality=not args.quick)
            heard = scores.pop("heard")
            what = "own encoder" if args.own_encoder else what
            report(args.folder, dict(what=what, speaker=speaker, **scores), texts, heard, args.show)
        soundfile.write(args.folder / f"codec_speaker{speaker}.wav", audios[0], SAMPLE_RATE_HZ)


def load_voice(args):
    """Speaks as the server does: long texts in parts."""
    engine = load_engine(str(args.folder), device="cpu", dtype=args.dtype, quantize=args.quantize)
    return LongForm(engine, Config().split_chars)


def evaluate_voice(args, judge):
    engine = load_voice(args)
    if args.training_texts:
        rows = Speech(args.training_texts, 1).rows
        texts = [row["text"] for row in rows if len(row["text"].split()) > 3][: args.sentences]
    else:
        tests = long_test_sentences() if args.what == "long" else TEST_SENTENCES
        texts = tests[: args.sentences]
    for speaker in (0, 1):
        started = time.time()
        audios, unended = [], 0
        for seed, text in enumerate(texts, args.seed):
            wait_while_paused()
            sampling = SamplingParams(temperature=args.temperature, top_k=args.top_k, seed=seed)
            request = Request(text=text, speaker=speaker, sampling=sampling, max_frames=MAX_FRAMES)
            audio, _, reason = speak(engine, request)
            unended += reason != "stop"
            audios.append(audio)
        made_s = time.time() - started
        speech_s = sum(map(len, audios)) / SAMPLE_RATE_HZ
        scores = judge.score(texts, audios, quality=not args.quick)
        heard = scores.pop("heard")
        results = dict(
            what="training texts" if args.training_texts else f"{args.what}, test texts",
            speaker=speaker,
            dtype=args.dtype,
            quantize=args.quantize,
            temperature=args.temperature,
            sentences=len(texts),
            **scores,
            unended=unended,
            speech_s=round(speech_s, 1),
            real_time_factor=round(made_s / max(speech_s, 0.1), 3),
        )
        report(args.folder.parent, results, texts, heard, args.show)


def evaluate_questions(args, judge):
    """Final rise in semitones, the mean of the questions and of the statements."""
    engine = load_voice(args)
    for speaker in (0, 1):
        rises = []
        for seed, text in enumerate(QUESTIONS + STATEMENTS, args.seed):
            request = Request(text, speaker, sampling=SamplingParams(seed=seed))
            rises.append(final_rise(np.asarray(speak(engine, request).audio)))
        asked, stated = np.array(rises).reshape(2, -1)
        results = dict(
            what="questions",
            speaker=speaker,
            question_semitones=round(float(asked.mean()), 1),
            statement_semitones=round(float(stated.mean()), 1),
            question_higher=int((asked > stated).sum()),
        )
        report(args.folder.parent, results, [], [], 0)


@quiet_on_closed_pipe()
def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["codec", "voice", "long", "questions"])
    parser.add_argument("folder", type=Path, help="RUN, or the exported checkpoint")
    parser.add_argument("--sentences", type=int, help="50, long: 100")
    parser.add_argument("--temperature", type=float, default=SamplingParams().temperature)
    parser.add_argument("--top-k", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="voice")
    parser.add_argument("--quantize", choices=list(PACKINGS), default="none", help="voice")
    parser.add_argument(
        "--training-texts", type=Path, metavar="RUN", help="voice: read the training texts of RUN"
    )
    parser.add_argument(
        "--own-encoder",
        action="store_true",
        help="codec: the pulse codes too are those of the codec's encoder",
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="skip DNSMOS")
    parser.add_argument("--show", type=int, default=5, help="number of transcripts to print")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    judge = Judge(args.threads)
    kinds = {"codec": evaluate_codec, "questions": evaluate_questions}
    kinds.get(args.what, evaluate_voice)(args, judge)


if __name__ == "__main__":
    main()
