"""Scores speech after other speech: word errors alone, after 1 and 3 segments, and so on.

    python evaluate_context.py CHECKPOINT [--sentences 25] [--only alone,same_1] [--dtype float32]

Needs the package and the judges, as evaluate.py does. For every kind of context and both speakers
it prints a JSON line: Whisper tiny.en's word error rate, DNSMOS, median F0, sentences that did not
end. Kinds: alone; same_N and other_N, N segments that the voice spoke, by the same speaker or by
both in turn; recorded_N, the same as WAV files in base64 with other levels, rates and noise, as a
request's `context` brings them; turns, a conversation of ten turns; long, one text in parts.
"""

import argparse
import base64
import json
from functools import lru_cache

import numpy as np
import soxr
import torch

from common import SAMPLE_RATE_HZ
from judge import Judge
from texts import TEST_SENTENCES
from vox_serve.audio import pcm16, wav_file
from vox_serve.context_field import ContextLimits, decode_context, encode_context, parse_context
from vox_serve.engine import Request
from vox_serve.loading import load_engine
from vox_serve.long_form import LongForm
from vox_serve.prompt import Segment
from vox_serve.sampling import SamplingParams
from vox_serve.say import speak
from voxkern.console import quiet_on_closed_pipe

KINDS = "alone same_1 same_3 recorded_1 recorded_3 other_1 other_3 turns long".split()  # noqa: SIM905
MAX_FRAMES = 200
NUM_TURNS = 10
PARTS_CHARS = 80
LIMITS = ContextLimits(max_bytes=32 << 20, max_s=160, max_text_chars=1000)
WAYS = ((24000, 0.0, None), (44100, -8.0, None), (48000, -4.0, -55.0))
"""Rate in Hz, level in dB and noise in dBFS of recordings."""


class Scorer:
    def __init__(self, args) -> None:
        quantize = args.quantize
        self.engine = load_engine(
            args.checkpoint, device="cpu", dtype=args.dtype, quantize=quantize
        )
        self.judge = None if args.silent else Judge(args.threads)
        self.texts = TEST_SENTENCES[: args.sentences]
        self.quality = args.quality
        self.spoken = lru_cache(None)(self._spoken)

    def say(self, text, speaker, seed, context):
        request = Request(text, speaker, context, SamplingParams(seed=seed), MAX_FRAMES)
        return speak(self.engine, request)

    def _spoken(self, index: int, speaker: int):
        """A segment with the codes of another test sentence, and its samples."""
        text = TEST_SENTENCES[index % len(TEST_SENTENCES)]
        audio, codes, _ = self.say(text, speaker, 1000 + index, ())
        return Segment(speaker, text, torch.as_tensor(np.asarray(codes))), np.asarray(audio)

    def before(self, kind: str, number: int, speaker: int) -> list[Segment]:
        """The context of sentence `number`."""
        if kind == "alone":
            return []
        what, count = kind.split("_")
        # With other_N every second segment is the other speaker's, the last one included.
        speakers = [speaker ^ (what == "other" and i % 2 == 0) for i in range(int(count))][::-1]
        said = [self.spoken(number + 7 + 11 * i, s) for i, s in enumerate(speakers)]
        if what != "recorded":
            return [segment for segment, _ in said]
        fields = parse_context(
            [
                dict(speaker=s.speaker, text=s.text, audio=uploaded(audio, number + i))
                for i, (s, audio) in enumerate(said)
            ]
        )
        mimi, config = self.engine.mimi, self.engine.prompts.config
        turns = decode_context(fields, config, mimi.config, LIMITS)
        return encode_context(turns, lambda audio: mimi.encode(torch.from_numpy(audio)[None])[0])

    def answers(self, kind: str, speaker: int):
        """(texts, audios, number that did not end)"""
        audios, unended = [], 0
        turns: list[Segment] = []
        if kind == "long":
            size = len(self.texts) // 4
            texts = [" ".join(self.texts[i * size : (i + 1) * size]) for i in range(4)]
            form = LongForm(self.engine, PARTS_CHARS)
        for number, text in enumerate(texts if kind == "long" else self.texts):
            if kind == "long":
                request = Request(text, speaker, None, SamplingParams(seed=number))
                audio, _, reason = speak(form, request)
            elif kind == "turns":
                turns = turns if number % NUM_TURNS else []
                turn_speaker = speaker ^ (number % 2)
                audio, codes, reason = self.say(text, turn_speaker, number, turns)
                turns = [*turns, Segment(turn_speaker, text, torch.as_tensor(np.asarray(codes)))]
            else:
                context = self.before(kind, number, speaker)
                audio, _, reason = self.say(text, speaker, number, context)
            unended += reason != "stop"
            audios.append(np.asarray(audio))
        return texts if kind == "long" else self.texts, audios, unended

    def score(self, kind: str) -> None:
        for speaker in (0, 1):
            texts, audios, unended = self.answers(kind, speaker)
            row = dict(kind=kind, speaker=speaker, sentences=len(texts), unended=unended)
            if self.judge:
                row |= self.judge.score(texts, audios, quality=self.quality)
                row.pop("heard")
            print(json.dumps(row), flush=True)


def uploaded(audio: np.ndarray, number: int) -> str:
    """A WAV file in base64."""
    rate_hz, level_db, noise_dbfs = WAYS[number % len(WAYS)]
    samples = soxr.resample(audio, SAMPLE_RATE_HZ, rate_hz) * 10 ** (level_db / 20)
    if noise_dbfs is not None:
        noise = np.random.default_rng(number).standard_normal(len(samples))
        samples = samples + noise * 10 ** (noise_dbfs / 20)
    data = wav_file(pcm16(samples.astype(np.float32)).tobytes(), rate_hz)
    return base64.b64encode(data).decode()


@quiet_on_closed_pipe()
def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("--sentences", type=int, default=50)
    parser.add_argument("--only", default=",".join(KINDS), help="kinds, with commas")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--quantize", default="none")
    parser.add_argument("--quality", action="store_true", help="DNSMOS too")
    parser.add_argument("--silent", action="store_true", help="no recogniser")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    scorer = Scorer(args)
    for kind in args.only.split(","):
        scorer.score(kind)


if __name__ == "__main__":
    main()
