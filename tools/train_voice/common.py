"""Shared by all steps: pausing, recorded speech, and interruptible training runs."""

import json
import os
import time
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

SAMPLE_RATE_HZ = 24000
FRAME_SAMPLES = 1920
FIRST_PHONE = 0xE000  # the private use character that stands for phone 0 in a tokenizer
SOUNDS_FILE = "phones.txt"
CHECKPOINT_S = 120
LOG_STEPS = 50


def wait_while_paused():
    """Sleeps while the file named by VOICE_PAUSE_FILE exists, to leave the machine to others."""
    pause_file = os.environ.get("VOICE_PAUSE_FILE")
    paused_s = 0.0
    while pause_file and os.path.exists(pause_file):
        time.sleep(1)
        paused_s += 1
    return paused_s


def autocast(device: str):
    """bf16, but not on a CPU without it, where it takes nine times as long as float32."""
    kind = torch.device(device).type
    fast = kind != "cpu" or torch.cpu._is_avx512_bf16_supported()
    return torch.autocast(kind, dtype=torch.bfloat16, enabled=fast)


class Speech:
    """The finished parts of RUN/data, memory-mapped. Every HOLD_OUT-th utterance is validation."""

    HOLD_OUT = 101  # odd: the speakers take turns

    def __init__(self, run: Path, max_parts: int | None = None):
        indices = sorted((run / "data").glob("*.jsonl"))[:max_parts]
        self.run = run
        self.parts = [np.memmap(i.with_suffix(".i16"), dtype="<i2", mode="r") for i in indices]
        self.rows = []
        for part, index in enumerate(indices):
            for line in index.read_text().splitlines():
                self.rows.append(json.loads(line) | {"part": part})
        self.train = [i for i in range(len(self.rows)) if i % self.HOLD_OUT]
        self.validation = [i for i in range(len(self.rows)) if i % self.HOLD_OUT == 0]

    def samples(self, index: int) -> np.ndarray:
        """float32 [S], zero-padded to whole frames."""
        row = self.rows[index]
        start = row["start_sample"]
        audio = self.parts[row["part"]][start : start + row["num_samples"]]
        return np.pad(audio.astype(np.float32) / 32767, (0, -len(audio) % FRAME_SAMPLES))

    def pulses(self, index: int) -> np.ndarray:
        """The pulse code of every frame, int64."""
        return np.array(self.rows[index]["pulses"], np.int64)

    def num_frames(self, index: int) -> int:
        return -(-self.rows[index]["num_samples"] // FRAME_SAMPLES)

    @cached_property
    def sounds(self) -> list[str]:
        """The sounds that have a label: those of RUN/phones.txt, else all that occur, sorted."""
        if (self.run / SOUNDS_FILE).exists():
            return read_sounds(self.run)
        return sorted({sound_of(phone) for row in self.rows for phone, _ in row["phones"]})

    def labels(self, index: int, step_samples: int) -> np.ndarray:
        """The sound in the middle of each step of an utterance, int64 [S / step_samples]: its index
        in `sounds`, or -100, which the losses ignore."""
        phones = self.rows[index]["phones"]
        ids = {sound: label for label, sound in enumerate(self.sounds)}
        labels = np.array([ids.get(sound_of(phone), -100) for phone, _ in phones])
        ends = np.array([end for _, end in phones])
        count = self.num_frames(index) * FRAME_SAMPLES // step_samples
        middles = np.arange(count) * step_samples + step_samples // 2
        return labels[np.minimum(np.searchsorted(ends, middles, side="right"), len(labels) - 1)]


def read_sounds(run: Path) -> list[str]:
    """The sounds that have a label, as train_codes.py wrote them. Speech that is added later may
    have others."""
    return (run / SOUNDS_FILE).read_text().split("\n")


def sound_of(phone: str) -> str:
    """The phone without its stress, and a space for all that is a pause. Codebook 0 has 9 bits for
    80 ms; none of them should say which mark made the pause."""
    sound = phone.lstrip("ˈˌ")
    return sound if sound.isalpha() else " "


class Training:
    """The clock, learning rate, log, plot and checkpoint of one training run.

    Progress is training time over `minutes` instead of steps, so a run fits its budget on any
    machine. On a CPU it is CPU time per thread: on a shared machine a run takes longer, but trains
    as much. The learning rate warms up, stays constant, and falls linearly to zero over the last
    `decay` of the run. RUN/NAME.pt holds the state of every module and optimizer in `states`,
    RUN/NAME.jsonl the losses and RUN/NAME.png their plot.
    """

    def __init__(self, run: Path, name: str, minutes: float, states: dict, decay=0.5, warmup=100):
        self.path = run / f"{name}.pt"
        self.log_path = run / f"{name}.jsonl"
        self.states = states
        self.total_s = minutes * 60
        self.decay = decay
        self.warmup = warmup
        self.step = 0
        self.elapsed_s = 0.0
        self.recent: dict[str, list[float]] = {}
        if self.path.exists():
            saved = torch.load(self.path, map_location="cpu", weights_only=True)
            self.step, self.elapsed_s = saved.pop("step"), saved.pop("elapsed_s")
            for key, state in saved.items():
                states[key].load_state_dict(state)
            print(f"resumed {self.path} at step {self.step}, {self.elapsed_s:.0f} s")

    @property
    def progress(self) -> float:
        return min(1.0, self.elapsed_s / self.total_s)

    @property
    def lr_factor(self) -> float:
        return min(1.0, (self.step + 1) / self.warmup) * min(1.0, (1 - self.progress) / self.decay)

    def steps(self):
        """Yields step numbers until time is up; sets learning rates and saves checkpoints."""
        last_save = time.time()
        peaks = {
            key: [group["lr"] if self.step == 0 else group["peak_lr"] for group in o.param_groups]
            for key, o in self.optimizers()
        }
        while self.elapsed_s < self.total_s:
            started = self.clock_s()
            for key, optimizer in self.optimizers():
                for group, peak in zip(optimizer.param_groups, peaks[key], strict=True):
                    group["peak_lr"] = peak
                    group["lr"] = peak * self.lr_factor
            yield self.step
            self.step += 1
            self.elapsed_s += self.clock_s() - started
            wait_while_paused()
            if time.time() - last_save > CHECKPOINT_S:
                self.save()
                last_save = time.time()
        self.save()

    def clock_s(self) -> float:
        if torch.cuda.is_available():
            return time.time()
        return time.process_time() / torch.get_num_threads()

    def optimizers(self):
        states = self.states.items()
        return [(key, s) for key, s in states if isinstance(s, torch.optim.Optimizer)]

    def log(self, **losses):
        """Prints and records the mean over every LOG_STEPS steps."""
        for key, value in losses.items():
            self.recent.setdefault(key, []).append(float(torch.as_tensor(value).detach()))
        if (self.step + 1) % LOG_STEPS == 0:
            self.record(**{key: np.mean(values) for key, values in self.recent.items()})
            self.recent = {}

    def record(self, **values):
        row = {"step": self.step + 1, "s": round(self.elapsed_s)}
        row |= {key: round(float(value), 4) for key, value in values.items()}
        print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
        with open(self.log_path, "a") as log:
            log.write(json.dumps(row) + "\n")

    def save(self):
        state = {key: s.state_dict() for key, s in self.states.items()}
        state |= {"step": self.step, "elapsed_s": self.elapsed_s}
        unfinished = self.path.with_suffix(".tmp")
        torch.save(state, unfinished)
        unfinished.rename(self.path)
        plot(self.log_path)


def plot(log_path: Path):
    """Plots every column of a JSON-lines log against minutes, into a .png next to it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    if not log_path.exists():
        return
    rows = [json.loads(line) for line in log_path.read_text().splitlines()]
    columns = sorted({key for row in rows for key in row} - {"step", "s"})
    figure, axes = plt.subplots(figsize=(8, 4.5))
    for column in columns:
        points = [(row["s"] / 60, row[column]) for row in rows if column in row]
        axes.plot(*zip(*points, strict=True), label=column, marker="." if len(points) < 20 else "")
    axes.set(xlabel="minutes", yscale="log", title=log_path.stem)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(log_path.with_suffix(".png"), dpi=110)
    plt.close(figure)
