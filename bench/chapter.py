"""A long text through `say`: words, joints, memory, speed.

    python bench/chapter.py TEXT.txt [--save FOLDER] [flags of say]

Runs the command `say` in a process of its own with the text on stdin, and notes the first frame of
each part of the text.

- `words wrong %`: word error rate, heard by the recogniser of `make .venv/test`. The speech is cut
  at silences for it.
- `joint step`, `largest step`: the largest difference of neighbouring samples at a joint of two
  parts, and anywhere else. A click at a joint would be larger.
- `MiB at a tenth`, `MiB at the end`: resident memory, after a tenth of the frames and at the end.
- `real-time factor`: seconds of work over seconds of speech, loading left out.

Prints a table and writes chapter.json.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import wave
from pathlib import Path

import numpy as np
from report import Report

ROOT = Path(__file__).parents[1]
RATE_HZ = 24000
PIECE_S = 20.0
"""The recogniser hears pieces of about this length."""
JOINT_SAMPLES = 24
"""A millisecond on either side of a joint counts as the joint."""

SAY = """
import json, resource, sys, time
from vox_serve import long_form, say

def resident_mib():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20

log, step = {"parts": [], "mib": []}, long_form.LongForm.step
num_frames = part = 0

def watched(self):
    global num_frames, part
    log.setdefault("start", time.monotonic())
    outputs = step(self)
    for output in outputs:
        if output.codes is not None:
            if output.part != part:
                part = output.part
                log["parts"].append(num_frames)
            num_frames += 1
            log["mib"].append(resident_mib())
    log["end"] = time.monotonic()
    return outputs

long_form.LongForm.step = watched
path, *args = sys.argv[1:]
code = say.main(args)
json.dump(log, open(path, "w"))
sys.exit(code)
"""


def speak(text: str, folder: Path, flags: list[str]) -> tuple[np.ndarray, dict]:
    """`say`'s samples, and its log."""
    wav, log = folder / "speech.wav", folder / "log.json"
    command = [sys.executable, "-c", SAY, str(log), "-o", str(wav), *flags]
    subprocess.run(command, input=text.encode(), check=True)
    with wave.open(str(wav)) as file:
        samples = np.frombuffer(file.readframes(file.getnframes()), np.int16) / 32768
    return samples.astype(np.float32), json.loads(log.read_text())


def pieces(samples: np.ndarray) -> list[np.ndarray]:
    """The speech, cut at the quietest places near every `PIECE_S`."""
    hop = RATE_HZ // 50
    levels = np.square(samples[: len(samples) // hop * hop].reshape(-1, hop)).mean(1)
    levels = np.convolve(levels, np.ones(10), "same")
    cuts, step = [0], int(PIECE_S * RATE_HZ / hop)
    while cuts[-1] + 3 * step // 2 < len(levels):
        start, stop = cuts[-1] + step // 2, cuts[-1] + 3 * step // 2
        cuts.append(start + int(np.argmin(levels[start:stop])))
    return np.split(samples, [cut * hop for cut in cuts[1:]])


def step_sizes(samples: np.ndarray, joints: list[int]) -> tuple[float, float]:
    """The largest difference of neighbouring samples at a joint, and elsewhere."""
    steps = np.abs(np.diff(samples))
    at_joint = np.zeros(len(steps), bool)
    for joint in joints:
        at_joint[max(joint - JOINT_SAMPLES, 0) : joint + JOINT_SAMPLES] = True
    return float(steps[at_joint].max(initial=0)), float(steps[~at_joint].max(initial=0))


def words_wrong(text: str, samples: np.ndarray) -> tuple[float, str] | None:
    """The word error rate in percent, and the words heard; None without the recogniser."""
    sys.path.insert(0, str(ROOT / "tools" / "train_voice"))
    from judge import Judge, word_errors

    try:
        judge = Judge()
    except ImportError:
        return None
    heard = " ".join(judge.transcribe(piece) for piece in pieces(samples))
    # Underscores and dashes mark emphasis and breaks.
    errors, words = word_errors(re.sub(r"[_-]", " ", text), re.sub(r"[_-]", " ", heard))
    return 100 * errors / words, heard


def main() -> None:
    parser = argparse.ArgumentParser(
        usage="python bench/chapter.py TEXT.txt [--save FOLDER] [flags of say]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("text", type=Path)
    parser.add_argument("--save", type=Path, default=ROOT / "build" / "chapter")
    args, flags = parser.parse_known_args()
    text = args.text.read_text()
    with tempfile.TemporaryDirectory() as folder:
        samples, log = speak(text, Path(folder), flags)
    frame = len(samples) // len(log["mib"])
    joint, elsewhere = step_sizes(samples, [first * frame for first in log["parts"]])
    seconds = len(samples) / RATE_HZ
    report = Report()
    args.save.mkdir(parents=True, exist_ok=True)
    report.path = args.save / "chapter.json"
    table = report.table(
        "chapter",
        [
            *("words", "parts", "speech s", "real-time factor", "words wrong %"),
            *("joint step", "largest step", "MiB at a tenth", "MiB at the end"),
        ],
    )
    wrong = words_wrong(text, samples)
    if wrong is None:
        report.leave_out("words wrong %", "the recogniser is not installed")
    else:
        (args.save / "heard.txt").write_text(wrong[1] + "\n")
    table.add(
        *(len(text.split()), len(log["parts"]) + 1, seconds),
        *((log["end"] - log["start"]) / seconds, None if wrong is None else wrong[0]),
        *(joint, elsewhere, log["mib"][len(log["mib"]) // 10], log["mib"][-1]),
    )


if __name__ == "__main__":
    main()
