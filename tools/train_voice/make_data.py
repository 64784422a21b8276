"""Step 1: synthesise the training speech.

    python make_data.py RUN --utterances 20000 [--workers 2]

RUN/data/NNNN.i16 holds 500 utterances end to end (int16, 24 kHz); NNNN.jsonl has a line for each:
text, speaker, start_sample, num_samples, phones [[phone, end_sample], ...], pulses
(a pulse code per frame). Finished parts are skipped, so an interrupted run resumes and a larger
--utterances extends an earlier one.
Two idle CPU cores synthesise about 140 hours of speech per hour.
"""

import argparse
import json
import multiprocessing
import time
from pathlib import Path

import numpy as np

from common import wait_while_paused
from teacher import SAMPLE_RATE_HZ, Teacher
from texts import corpus

PART_UTTERANCES = 500


def make_part(job):
    folder, part, texts = job
    done = folder / f"{part:04d}.jsonl"
    if done.exists():
        return 0
    teacher = Teacher()
    rows, position = [], 0
    with open(folder / f"{part:04d}.i16", "wb") as audio:
        for index, text in enumerate(texts):
            wait_while_paused()
            number = part * PART_UTTERANCES + index
            speed = float(np.random.default_rng(number).uniform(0.95, 1.08))
            spoken = teacher.say(text, number % 2, speed, seed=number)
            if spoken is None:
                continue
            samples, phones, pulses = spoken
            audio.write((samples * 32767).astype("<i2").tobytes())
            rows.append(
                dict(
                    text=text,
                    speaker=number % 2,
                    start_sample=position,
                    num_samples=len(samples),
                    phones=phones,
                    pulses=pulses.tolist(),
                )
            )
            position += len(samples)
    unfinished = done.with_suffix(".tmp")
    unfinished.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    unfinished.rename(done)
    return position


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--utterances", type=int, default=20000)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    folder = args.run / "data"
    folder.mkdir(parents=True, exist_ok=True)
    # One fixed corpus for every count: extending a run must not reorder its existing parts.
    texts = corpus(60000)[: args.utterances]
    jobs = [
        (folder, part, texts[part * PART_UTTERANCES : (part + 1) * PART_UTTERANCES])
        for part in range(len(texts) // PART_UTTERANCES)
    ]
    started = time.time()
    total = 0
    with multiprocessing.Pool(args.workers) as pool:
        for finished, samples in enumerate(pool.imap(make_part, jobs), 1):
            total += samples
            hours = total / SAMPLE_RATE_HZ / 3600
            print(f"part {finished}/{len(jobs)}  {hours:.2f} h  {time.time() - started:.0f} s")


if __name__ == "__main__":
    main()
