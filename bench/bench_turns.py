"""Time to first audio of a conversation's turns, and of a voice prompt, through the engine.

Each turn is a request whose context is everything said before it, as a conversation sends it.
The history is cached, so a turn should compute little but its own text. Figures, in milliseconds
from `prepare` to the first frame's samples on the host:

- `first turn`: no history.
- `tenth turn`: about a minute of history, two speakers in turn, or as much of it as a conversation
  leaves in the model's context. Between turns the engine prefills the next context, as it does in a
  server while the listener hears the answer.
- `prefill ahead`: the longest such prefill of a conversation; most have little to compute.
- `voice first`, `voice again`: the first and second request with a new voice prompt of ten seconds.

Every turn has about as much text. `times first` is the ratio to the first turn of the same
conversations. Rows: the built-in voice in float32, and full-size CSM-1B with random weights. Every
conversation has words of its own, so that none finds the pages of another.
"""

import statistics
import time
from collections.abc import Callable

import torch
from bench_codec import our_codecs, random_model
from bench_frame import PRECISIONS, our_model
from csm_1b_shapes import FRAME_MS
from report import Report
from torch import Tensor

from vox_serve.conversations import Conversation, Turn
from vox_serve.engine import Engine
from vox_serve.loading import codec_precision
from vox_serve.model_config import CsmConfig
from vox_serve.prompt import Segment
from vox_serve.request import Prompt, Request
from vox_serve.sampling import SamplingParams

TURNS = 10
TURN_FRAMES = 84
"""Most frames of a turn: nine turns last 60 s. The built-in voice may end earlier."""
VOICE_FRAMES = 125
TEXT_TOKENS = 24
TEXT_WORDS = 18
WORDS = (
    "the river runs past our old house and every morning we walk to the bridge before breakfast "
    "because my sister likes to watch boats carry stone or timber down from the northern hills"
)
CONVERSATIONS = 3
CACHE_BYTES = 512 << 20

Parts = list[tuple[Tensor, Tensor]]


class Talker:
    """Speaks turns with one engine.

    Args:
        engine: its default context is left out.
    """

    def __init__(self, engine: Engine):
        self.engine = engine
        self.model = engine.model
        self._draws = torch.Generator().manual_seed(0)

    def text(self) -> tuple[Tensor, Tensor]:
        """Random words, or random tokens for random weights, as the backbone's input."""
        if self.engine.prompts is not None:
            words = WORDS.split()
            chosen = torch.randint(len(words), (TEXT_WORDS,), generator=self._draws).tolist()
            text = " ".join(words[i] for i in chosen).capitalize() + "."
            return self.engine.prompts.build([Segment(0, text)])
        c = self.model.config
        frames = torch.zeros(TEXT_TOKENS, c.num_codebooks + 1, dtype=torch.int64)
        frames[:, -1] = torch.randint(1, c.text_vocab_size, (TEXT_TOKENS,), generator=self._draws)
        mask = torch.zeros_like(frames, dtype=torch.bool)
        mask[:, -1] = True
        return frames, mask

    def codes(self, frames: int) -> Tensor:
        """Random codes `[frames, K]`."""
        c = self.model.config
        shape = (frames, c.num_codebooks)
        return torch.randint(1, self.engine.mimi.config.codebook_size, shape, generator=self._draws)

    def audio(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and the end of the segment as the backbone's input."""
        end = torch.zeros(1, codes.shape[1], dtype=torch.int64)
        return self.model.next_inputs(torch.cat([codes, end]))

    def say(
        self, before: Parts, text: tuple[Tensor, Tensor], frames: int | None
    ) -> tuple[float, Tensor]:
        """Milliseconds to the first frame, and all codes."""
        start = time.perf_counter()
        prompt = Prompt.build(*(torch.cat(parts) for parts in zip(*before, text, strict=True)))
        request = Request("", sampling=SamplingParams(seed=1), max_frames=frames)
        self.engine.add(request, prompt)
        codes: list[Tensor] = []
        first_ms = 0.0
        while self.engine.has_work:
            for output in self.engine.step():
                first_ms = first_ms or (time.perf_counter() - start) * 1e3
                if output.codes is not None:
                    codes.append(output.codes)
        # A turn may be a stop frame and nothing else.
        none = torch.empty(0, self.model.config.num_codebooks, dtype=torch.int32)
        return first_ms, torch.stack(codes) if codes else none

    def prefill_next(self, before: Parts) -> float:
        """Milliseconds in which a context is prefilled, while nobody waits."""

        def build() -> Prompt:
            return Prompt.build(*(torch.cat(parts) for parts in zip(*before, strict=True)))

        start = time.perf_counter()
        self.engine.idle_prefill.put("", "", build, lambda: True)
        self.engine.idle_prefill.build_next()
        while self.engine.idle_prefill.has_work:
            self.engine.idle_prefill.step()
        return (time.perf_counter() - start) * 1e3

    def converse(self) -> tuple[list[float], list[float], float]:
        """Milliseconds to the first frame of each turn, milliseconds of `prefill_next` after each,
        and seconds of speech before the last one."""
        kept = Conversation("", "", self.engine.max_positions)
        said: list[Parts] = []
        times, idle, history_s = [], [], 0.0

        def context(text: tuple[Tensor, Tensor]) -> Parts:
            """The turns that the conversation gives to a text."""
            nonlocal history_s
            turns = kept.context(self.engine.max_positions - len(text[0]) - TURN_FRAMES)
            history_s = sum(len(turn.codes) for turn in turns) * FRAME_MS / 1e3
            return [part for parts in said[len(said) - len(turns) :] for part in parts]

        for turn in range(TURNS):
            text = self.text()
            before = context(text)
            first_ms, codes = self.say(before, text, TURN_FRAMES if turn + 1 < TURNS else 1)
            times.append(first_ms)
            if turn + 1 < TURNS:
                said.append([text, self.audio(codes)])
                num_positions = sum(len(frames) for frames, _ in said[-1])
                kept.add(Turn(0, "", codes.numpy(), True, num_positions))
                idle.append(self.prefill_next(context(text)))  # as if the next text were as long
        return times, idle, history_s

    def use_voice(self) -> tuple[float, float]:
        """Milliseconds to the first frame with a new voice, and with the same one again."""
        voice = [self.text(), self.audio(self.codes(VOICE_FRAMES))]
        first, again = (self.say(voice, self.text(), 1)[0] for _ in range(2))
        return first, again


def run(report: Report, config: CsmConfig, precisions: list[str], device: str) -> None:
    """Add table `turns` to the report.

    Args:
        report: of the run.
        config: sizes of the random model.
        precisions: of `bench_frame.PRECISIONS`, for the random model.
        device: "cpu" or "cuda".
    """
    table = report.table(
        "turns", ["what", "precision", "turn", "ms", "ms most", "history s", "times first"]
    )
    for name, precision, make in _engines(config, precisions, device):
        talker = Talker(make())
        talker.say([], talker.text(), 4)  # warms up
        conversations = [talker.converse() for _ in range(CONVERSATIONS)]
        voices = [talker.use_voice() for _ in range(CONVERSATIONS)]
        first = statistics.median(times[0] for times, _, _ in conversations)
        history_s = statistics.median(seconds for _, _, seconds in conversations)
        voice_s = VOICE_FRAMES * FRAME_MS / 1e3
        for turn, times, seconds in (
            ("first turn", [times[0] for times, _, _ in conversations], 0.0),
            ("tenth turn", [times[-1] for times, _, _ in conversations], history_s),
            ("prefill ahead", [max(idle) for _, idle, _ in conversations], history_s),
            ("voice first", [times[0] for times in voices], voice_s),
            ("voice again", [times[1] for times in voices], voice_s),
        ):
            ms = statistics.median(times)
            table.add(name, precision, turn, ms, max(times), seconds, ms / first)


def _engines(
    config: CsmConfig, precisions: list[str], device: str
) -> list[tuple[str, str, Callable[[], Engine]]]:
    """Names, precisions and makers of the engines."""

    def demo() -> Engine:
        from vox_serve.config import Config
        from vox_serve.speech import make_engine

        return make_engine(Config(model="demo", device=device)).engine

    def random(precision: str) -> Engine:
        codec = codec_precision(device, *PRECISIONS[precision])
        mimi = our_codecs(random_model(), [codec], device)[codec]
        model = our_model(config, precision, device)
        return Engine(model, mimi, prompts=None, prefix_cache_bytes=CACHE_BYTES)

    return [
        ("built-in voice", "float32", demo),
        *(("random CSM-1B", p, lambda p=p: random(p)) for p in precisions),
    ]
