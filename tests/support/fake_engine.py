"""An engine without a model: audio derived from text, seed and frame, and modes that misbehave."""

import threading
import time
import zlib
from collections.abc import Callable, Collection, Sequence
from types import SimpleNamespace

import numpy as np
import torch

from vox_serve.audio import pcm16
from vox_serve.ending import fade_out
from vox_serve.engine import FrameOutput, Prompt, PromptTooLongError, Request
from vox_serve.page_pool import PrefixKeys
from vox_serve.policy import Row
from vox_serve.prompt import Segment
from vox_serve.speech_lengths import SpeechLengths
from vox_serve.step_times import StepTimes

NUM_CODEBOOKS = 4
CODEBOOK_SIZE = 64
FRAME_SAMPLES = 1920
MAX_TEXT_CHARS = 2000
ENDLESS = 10**9
"""Frames of an utterance that outlasts any test."""
TIMEOUT_S = 30
"""Limit for a wait that a correct server ends at once."""


def fake_audio(text: str, seed: int | None, frame: int) -> np.ndarray:
    """Samples `[1920]`, float32 in -1 to 1."""
    key = zlib.crc32(f"{text}|{seed}|{frame}".encode())
    return np.random.default_rng(key).uniform(-1, 1, FRAME_SAMPLES).astype(np.float32)


def fake_codes(text: str, frame: int) -> torch.Tensor:
    """Codes `[K]` int64, never all zero."""
    return torch.arange(NUM_CODEBOOKS) + frame + len(text)


class FakeMimi:
    """The codec's interface: the code of each frame is its mean, scaled; the same in all codebooks.

    `before_piece` is called before each piece of a recording is encoded.
    """

    config = SimpleNamespace(sample_rate_hz=24_000, frame_samples=FRAME_SAMPLES)
    device = torch.device("cpu")
    encoder = object()
    before_piece: Callable[[], None] = staticmethod(lambda: None)

    def init_encoder_state(self) -> None: ...

    def init_state(self) -> None: ...

    def encode_step(self, audio: torch.Tensor, state: None, num_codebooks: int) -> torch.Tensor:
        self.before_piece()
        frames = audio.view(1, -1, FRAME_SAMPLES).abs().mean(2)
        return (frames * CODEBOOK_SIZE).long()[..., None].expand(-1, -1, num_codebooks)

    def decode_step(self, codes: torch.Tensor, state: None) -> torch.Tensor:
        return (codes[..., 0].float() / CODEBOOK_SIZE).repeat_interleave(FRAME_SAMPLES, 1)


class FakePrompts:
    """The prompt builder's interface: a token for each character."""

    config = SimpleNamespace(
        num_codebooks=NUM_CODEBOOKS,
        audio_vocab_size=CODEBOOK_SIZE + 3,
        backbone=SimpleNamespace(max_positions=512),
        num_speakers=2,
    )

    def tokens(self, segment: Segment) -> list[int]:
        return [ord(c) for c in segment.text]

    def build(self, segments: Sequence[Segment]) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = [token for segment in segments for token in self.tokens(segment)]
        frames = torch.tensor(tokens)[:, None]
        return frames, torch.ones_like(frames, dtype=torch.bool)


class FakeIdlePrefill:
    """`IdlePrefill`'s interface. A step ends a context and calls `on_step`, which may raise."""

    def __init__(self) -> None:
        self.waiting: dict[str, Callable[[], Prompt]] = {}
        self.built: list[str] = []
        self.done: list[str] = []
        self.on_step: Callable[[], None] = lambda: None

    @property
    def has_work(self) -> bool:
        return bool(self.built)

    def put(
        self, client: str, key: str, build: Callable[[], Prompt], is_wanted: Callable[[], bool]
    ) -> None:
        self.waiting[key] = build

    def build_next(self) -> bool:
        if not self.waiting:
            return False
        key = next(iter(self.waiting))
        self.waiting.pop(key)()
        self.built.append(key)
        return True

    def clear(self) -> None:
        self.built.clear()

    def step(self) -> None:
        if self.built:
            self.done.append(self.built.pop(0))
            self.on_step()


class FakeEngine:
    """`vox_serve.engine.Engine`'s interface; one frame per request and step.

    Args:
        num_frames: frames in every utterance, unless `max_frames` ends it earlier.
        max_batch_size: requests that share a step.
        step_s: duration of a step.
        prepare_s: duration of `prepare`.
        fail_at_step: the first step from this one on raises RuntimeError, once.

    A step also raises RuntimeError while a request with the text "poison" is in it; "late poison"
    lets its first two frames pass. The text "nan" ends with "error" after two frames. `fault` is
    called before every step, and may raise.
    """

    sample_rate_hz = 24_000
    num_codebooks = NUM_CODEBOOKS
    num_spare_rows = 0
    model = None
    max_silence_s = 0.0
    max_positions = 512
    max_part_chars = None
    split_chars, part_chars = 400, 128
    default_context = ()
    follows_context = True

    def __init__(
        self,
        num_frames: int = 3,
        max_batch_size: int = 2,
        step_s: float = 0.0,
        prepare_s: float = 0.0,
        fail_at_step: int | None = None,
    ):
        self.num_frames = num_frames
        self.max_batch_size = max_batch_size
        self.step_s = step_s
        self.prepare_s = prepare_s
        self.fail_at_step = fail_at_step
        self.mimi = FakeMimi()
        self.prompts = FakePrompts()
        self.times, self.lengths = StepTimes(), SpeechLengths()
        self.idle_prefill = FakeIdlePrefill()
        self.rows: list[Row] = []
        self.requests: list[Request] = []
        self.aborted: list[str] = []
        self.saw_abort = threading.Event()
        self.num_steps = 0
        self.num_resets = 0
        self.most_open = 0
        self.fault: Callable[[], None] = lambda: None
        self._broken = False
        self._open: dict[str, tuple[Request, int]] = {}

    @property
    def has_work(self) -> bool:
        return bool(self._open)

    def cache_counts(self) -> dict[str, int]:
        return {"pages": 0}

    def spoken_text(self, request: Request) -> str:
        return request.text

    def prepare(self, request: Request) -> Prompt:
        time.sleep(self.prepare_s)
        if len(request.text) > MAX_TEXT_CHARS:
            raise PromptTooLongError(f"the prompt takes {len(request.text)} of {MAX_TEXT_CHARS}")
        frames = torch.tensor([ord(c) for c in request.text])
        return Prompt(frames, torch.ones(len(frames), dtype=torch.bool), PrefixKeys())

    def add(self, request: Request, prompt: Prompt | None = None, row: Row | None = None) -> Row:
        prompt = prompt or self.prepare(request)
        assert prompt.frames.tolist() == [ord(c) for c in request.text]
        if request.text == "crash":
            raise KeyError("a bug in add")
        self.requests.append(request)
        self._open[request.id] = (request, 0)
        return row or Row(request.id, time.monotonic())

    def abort(self, request_id: str) -> None:
        if self._open.pop(request_id, None):
            self.aborted.append(request_id)
            self.saw_abort.set()

    def warm_up(self, seconds: float) -> None: ...

    def reset(self) -> None:
        self.num_resets += 1
        self.idle_prefill.clear()
        self._open.clear()
        self._broken = False

    def step(self, held: Collection[str] = ()) -> list[FrameOutput]:
        time.sleep(self.step_s)
        self.num_steps += 1
        assert not self._broken
        self.most_open = max(self.most_open, len(self._open))
        live = [(request, n) for request, n in self._open.values() if request.id not in held]
        live = live[: self.max_batch_size]
        self._broken = True
        self.fault()
        if self.fail_at_step is not None and self.num_steps >= self.fail_at_step:
            self.fail_at_step = None
            raise RuntimeError("the fake engine broke")
        for request, frame in live:
            if request.text == "poison" or (request.text == "late poison" and frame == 2):
                raise RuntimeError("the fake engine broke")
        self._broken = False
        return [self._next(request, frame) for request, frame in live]

    def _next(self, request: Request, frame: int) -> FrameOutput:
        if frame == self.num_frames:
            del self._open[request.id]
            return FrameOutput(request.id, None, None, "stop")
        if request.text == "nan" and frame == 2:
            del self._open[request.id]
            return FrameOutput(request.id, None, None, "error", "the audio is not finite")
        self._open[request.id] = (request, frame + 1)
        reason = None
        if frame + 1 == request.max_frames:
            del self._open[request.id]
            reason = "length"
        audio = fake_audio(request.text, request.sampling.seed, frame)
        return FrameOutput(request.id, fake_codes(request.text, frame), audio, reason)


def expected_audio(
    text: str, num_frames: int, seed: int | None = None, cut: bool = False
) -> np.ndarray:
    """An utterance that a `FakeEngine` speaks, as it is delivered.

    Args:
        text, num_frames, seed: the utterance.
        cut: `max_frames` ends it, so that it fades.
    """
    frames = [fake_audio(text, seed, i) for i in range(num_frames)]
    audio = np.concatenate([np.zeros(0, np.float32), *frames])
    return fade_out(audio) if cut else audio


def expected_pcm(text: str, num_frames: int, seed: int | None = None, cut: bool = False) -> bytes:
    """16-bit PCM of `expected_audio`."""
    return pcm16(expected_audio(text, num_frames, seed, cut)).tobytes()
