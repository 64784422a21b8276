"""Servers whose engine is a table of step times, driven by the policy of the real one.

Discrete events in a heap: a request arrives, or a server's step ends. All randomness is drawn from
seeds, so a run gives the same figures on any machine.
"""

import heapq
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from math import inf

from playback import percentile

from vox_serve.admission import can_admit
from vox_serve.line_pace import LATEST, LinePace
from vox_serve.policy import FRAME_S, Row, Step, choose_step
from vox_serve.speech_lengths import SpeechLengths
from vox_serve.step_times import StepTimes

Choose = Callable[[Sequence[Row], float, StepTimes, int], Step]
Admit = Callable[[Sequence[Row], float, StepTimes, bool, float, float], bool]


BESIDE = 2.0
"""Tokenizing shares the processors with the step's threads."""


@dataclass(frozen=True)
class Machine:
    """Costs of a step, in seconds.

    Attributes:
        name: for tables.
        rows_s: seconds of steps of 0, 1, ... rows.
        tokens_s: seconds of 0, 1, ... prompt tokens, up to a step's most.
        chunk_tokens: most prompt tokens of a step in which others have work.
        jitter: standard deviation of the logarithm of a step's time.
        ratios: quantiles of a step's time over these costs, in place of `jitter`.
        overhead_s: from the client to the line, and from the step's end to the client.
        prepare_s: of this, the part before the line; beside a step it takes `BESIDE` times as long.
    """

    name: str
    rows_s: Sequence[float]
    tokens_s: Sequence[float]
    chunk_tokens: int
    jitter: float = 0.0
    ratios: Sequence[float] = ()
    overhead_s: float = 0.0
    prepare_s: float = 0.0

    def step_s(self, rows: int, tokens: int, draw: random.Random) -> float:
        ideal_s = self.rows_s[rows] + self.tokens_s[tokens]
        if self.ratios:
            at = draw.random() * (len(self.ratios) - 1)
            low = self.ratios[int(at)]
            return ideal_s * (low + (at % 1) * (self.ratios[int(at) + 1] - low))
        return ideal_s * draw.lognormvariate(0.0, self.jitter) if self.jitter else ideal_s

    def streams(self) -> int:
        """The most rows whose step takes no longer than a frame plays."""
        return max(n for n, seconds in enumerate(self.rows_s) if seconds <= FRAME_S)


@dataclass(frozen=True)
class Speech:
    """A request.

    Attributes:
        at_s: arrival.
        frames: length of its speech.
        prompt_tokens: positions to prefill.
        guess: of `frames`, by the text; the server corrects it by what it has learnt.
        streaming: somebody listens while it is spoken.
    """

    at_s: float
    frames: int
    prompt_tokens: int
    guess: float = inf
    streaming: bool = True


@dataclass
class Outcome:
    """The outcome of a request; times from its arrival.

    Attributes:
        refused: answered 429.
        refused_s: time until then.
        first_s, end_s: first and last frame; None if there was none.
        underruns: frames that came later than the audio before them ended.
        server: index of its server.
    """

    refused: bool = False
    refused_s: float = 0.0
    first_s: float | None = None
    end_s: float | None = None
    underruns: int = 0
    server: int = 0


@dataclass
class Policy:
    """The rules of the servers; the ablation replaces parts of it.

    Attributes:
        choose, admit: see `vox_serve.policy` and `vox_serve.admission`.
        max_wait_s: requests whose predicted wait is longer are refused, and those that waited so
            long.
        most_rows: places of a server.
        learns: the length of speech is learnt.
    """

    choose: Choose = choose_step
    admit: Admit = can_admit
    max_wait_s: float = 10.0
    most_rows: int = 4096
    learns: bool = True


@dataclass
class _Server:
    machine: Machine
    policy: Policy
    draw: random.Random
    times: StepTimes = field(default_factory=StepTimes)
    lengths: SpeechLengths = field(default_factory=SpeechLengths)
    live: dict[str, Row] = field(default_factory=dict)
    line: deque[int] = field(default_factory=deque)
    line_pace: LinePace = field(default_factory=LinePace)
    busy: bool = False
    prepared_s: float = 0.0
    """When the last request to arrive is in the line: one is tokenized at a time."""

    retry_at_s: float = 0.0
    """The line is not looked at again before this time."""


class Simulation:
    """Serves requests with one server or several.

    Args:
        machine: of each server.
        policy: of each server.
        speeches: in order of arrival.
        num_servers: each request goes to the server with the fewest requests.
        seed: of the jitter.
        watch: called with the time, the step, its seconds and all live rows at each step's begin.
    """

    def __init__(
        self,
        machine: Machine,
        policy: Policy,
        speeches: Sequence[Speech],
        num_servers: int = 1,
        seed: int = 0,
        watch: Callable[[float, Step, float, list[Row]], None] | None = None,
    ) -> None:
        self.speeches = speeches
        self.outcomes = [Outcome() for _ in speeches]
        self.steps = self.busy_s = 0.0
        self._watch = watch
        self._servers = [
            _Server(machine, policy, random.Random(f"{seed} {i}")) for i in range(num_servers)
        ]
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._order = count()
        for server in self._servers:  # a server warms up before it is ready
            for rows in (1, 2):
                server.times.observe(rows, 0, machine.rows_s[rows])
            server.times.observe(1, 16, machine.rows_s[1] + machine.tokens_s[16])

    def run(self) -> list[Outcome]:
        """Serve all requests to their end."""
        for index, speech in enumerate(self.speeches):
            self._at(speech.at_s, partial(self._arrive, index))
        while self._events:
            at_s, _, happen = heapq.heappop(self._events)
            happen(at_s)
        return self.outcomes

    def _at(self, at_s: float, happen: Callable[[float], None]) -> None:
        heapq.heappush(self._events, (at_s, next(self._order), happen))

    def _arrive(self, index: int, now_s: float) -> None:
        number = min(
            range(len(self._servers)),
            key=lambda i: (len(self._servers[i].live) + len(self._servers[i].line), i),
        )
        server = self._servers[number]
        self.outcomes[index].server = number
        prepare_s = server.machine.prepare_s * (BESIDE if server.busy else 1.0)
        if not prepare_s:
            self._put_in_line(server, index, now_s)
            return
        server.prepared_s = max(now_s, server.prepared_s) + prepare_s
        self._at(server.prepared_s, partial(self._put_in_line, server, index))

    def _put_in_line(self, server: _Server, index: int, now_s: float) -> None:
        server.line.append(index)
        self._admit(server, now_s, arrived=True)
        if server.line and server.line[-1] == index:
            rows, num_ahead = list(server.live.values()), len(server.line) - 1
            wait_s = server.line_pace.wait_s(rows, now_s, server.times, num_ahead)
            if wait_s > server.policy.max_wait_s:
                self._refuse(server, index, now_s)
            else:
                latest_s = now_s + LATEST * server.policy.max_wait_s
                self._at(latest_s, partial(self._refuse, server, index))
        if not server.busy:
            self._begin(server, now_s)

    def _refuse(self, server: _Server, index: int, now_s: float) -> None:
        """Refuse a request that still waits."""
        if index in server.line:
            server.line.remove(index)
            self.outcomes[index].refused = True
            self.outcomes[index].refused_s = now_s - self.speeches[index].at_s

    def _admit(self, server: _Server, now_s: float, arrived: bool = False) -> None:
        if now_s < server.retry_at_s and not (arrived and len(server.line) == 1):
            return
        while server.line:
            speech = self.speeches[server.line[0]]
            frames, spread = server.lengths.expected(speech.guess), server.lengths.spread
            rows = list(server.live.values())
            full = len(rows) >= server.policy.most_rows
            if full or (
                rows
                and not server.policy.admit(
                    rows, now_s, server.times, speech.streaming, frames, spread
                )
            ):
                server.retry_at_s = now_s + 0.01
                return
            row = Row(
                str(server.line.popleft()),
                now_s,
                streams=speech.streaming,
                num_missing=speech.prompt_tokens,
                frames_expected=frames,
            )
            server.live[row.id] = row
            server.line_pace.admitted(now_s, len(server.line))

    def _begin(self, server: _Server, now_s: float) -> None:
        self._admit(server, now_s)
        if not server.live:
            return
        rows = list(server.live.values())
        step = server.policy.choose(rows, now_s, server.times, server.machine.chunk_tokens)
        ended = [row for row, tokens in step.prompts if tokens == row.num_missing]
        tokens = sum(tokens for _, tokens in step.prompts)
        num_rows = len(step.frames) + len(ended)
        assert num_rows + tokens, "a step does nothing"
        step_s = server.machine.step_s(num_rows, tokens, server.draw)
        if self._watch:
            self._watch(now_s, step, step_s, rows)
        server.times.observe(num_rows, tokens, step_s)
        server.busy = True
        self.steps += 1
        self.busy_s += step_s
        self._at(now_s + step_s, partial(self._end, server, step, ended))

    def _end(self, server: _Server, step: Step, ended: list[Row], now_s: float) -> None:
        server.busy = False
        for row, tokens in step.prompts:
            row.prefilled(tokens, now_s)
        for row in [*step.frames, *ended]:
            index = int(row.id)
            speech, outcome = self.speeches[index], self.outcomes[index]
            if row.num_frames and row.streams and now_s > row.due_s:
                outcome.underruns += 1
            row.made_frame(now_s)
            overhead_s = server.machine.overhead_s - server.machine.prepare_s
            since_s = now_s - speech.at_s + overhead_s
            if row.num_frames == 1:
                outcome.first_s = since_s
            if row.num_frames == speech.frames:
                outcome.end_s = since_s
                del server.live[row.id]
                if server.policy.learns:
                    server.lengths.ended(speech.guess, speech.frames)
                server.retry_at_s = 0.0
        self._begin(server, now_s)


def summary(speeches: Sequence[Speech], outcomes: Sequence[Outcome]) -> dict[str, float | None]:
    """Figures of the streams, and the longest time of a whole answer.

    `goodput` is streams without a gap a second, from the first arrival to the last end.
    """
    streams = [
        outcome for speech, outcome in zip(speeches, outcomes, strict=True) if speech.streaming
    ]
    firsts = [outcome.first_s for outcome in streams if outcome.first_s is not None]
    whole = [
        outcome.end_s
        for speech, outcome in zip(speeches, outcomes, strict=True)
        if not speech.streaming and outcome.end_s is not None
    ]
    good = sum(not outcome.underruns and outcome.end_s is not None for outcome in streams)
    ends_s = [
        speech.at_s + outcome.end_s
        for speech, outcome in zip(speeches, outcomes, strict=True)
        if outcome.end_s is not None
    ]
    span_s = max([*ends_s, speeches[-1].at_s]) - speeches[0].at_s
    return {
        "streams": len(streams),
        **{f"first p{p} ms": _ms(percentile(firsts, p)) for p in (50, 95, 99)},
        "gapped": sum(outcome.underruns > 0 for outcome in streams),
        "refused": sum(outcome.refused for outcome in streams),
        "goodput": good / span_s,
        "whole longest s": max(whole, default=None),
    }


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1e3
