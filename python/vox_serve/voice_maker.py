"""Makes voices of recordings: decodes and encodes them, and checks that a prompt of them fits."""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vox_serve.audio import pcm16
from vox_serve.context_field import MAX_CHANNELS, RATES_HZ, Turn, encode_context
from vox_serve.mimi import Mimi
from vox_serve.prompt import PromptBuilder, Segment
from vox_serve.prompt_audio import PromptOptions, clean_prompt, speech_level_dbfs
from vox_serve.recording import Limits, Recording, decode
from vox_serve.voice_file import MAX_RECORDINGS, Sizes, Voice, VoiceError

MAX_CONTEXT_SHARE = 0.5
"""Share of the model's context that a voice may take. The rest is for the text and its speech."""

MIN_FRAMES = 4
"""Shortest recording, 0.32 s."""

PREVIEW_S = 15
PIECE_FRAMES = 8
"""Frames that are encoded, or decoded for the preview, between two pauses."""


Audio = np.ndarray | bytes | str | os.PathLike[str]
"""Samples `[S]`, an encoded recording, or a file."""


class Excerpt(NamedTuple):
    """A recording and its transcript.

    Attributes:
        audio: `[S]` float32 at the codec's sample rate, in -1..1.
        transcript: not blank.
        level_dbfs: the level of its speech, if it is known.
    """

    audio: np.ndarray
    transcript: str
    level_dbfs: float | None = None


class VoiceMaker:
    """Makes voices for one model.

    It may run in a thread of its own beside the engine's steps: the codec's state is passed in, and
    ops of two threads do not share scratch memory. While an op of one thread uses the kernels'
    other threads, an op of the other one runs on its own thread alone, with equal results.

    Args:
        mimi: the model's codec.
        prompts: the model's tokenizer and sizes.
    """

    def __init__(self, mimi: Mimi, prompts: PromptBuilder) -> None:
        self.mimi = mimi
        self.prompts = prompts
        self.sizes = Sizes.of(prompts.config)
        self.max_positions = int(MAX_CONTEXT_SHARE * prompts.config.backbone.max_positions)
        self.frame_s = mimi.config.frame_samples / mimi.config.sample_rate_hz

    @property
    def max_s(self) -> float:
        """Longest recording, if its transcript took no place."""
        return self.max_positions * self.frame_s

    @property
    def max_context_s(self) -> float:
        """The model's whole context as speech."""
        return self.prompts.config.backbone.max_positions * self.frame_s

    def excerpt(self, source: bytes | Path, transcript: str) -> Excerpt:
        """Decode and clean a recording.

        Args:
            source: the encoded bytes, in a common format; or a file, in any.
            transcript: what it says.

        Raises:
            OSError, AudioError: it cannot be read, is silent, or is longer than `max_s`.
        """
        sizes, limits = self.mimi.config, Limits(max_s=self.max_s)
        if isinstance(source, bytes):
            limits = replace(limits, rates_hz=RATES_HZ, max_channels=MAX_CHANNELS, common_only=True)
        recording = decode(source, limits)
        options = PromptOptions(max_s=self.max_s)
        audio = clean_prompt(recording, sizes.sample_rate_hz, sizes.frame_samples, options)
        level = speech_level_dbfs(audio, sizes.sample_rate_hz)
        return Excerpt(audio, transcript, round(level, 1))

    def make(
        self,
        name: str,
        speaker: int,
        excerpts: Sequence[Excerpt],
        pause: Callable[[float], None] = lambda worked_s: None,
    ) -> Voice:
        """Encode recordings as a voice.

        Args:
            name: the voice's name.
            speaker: the speaker that the segments and later texts are tagged with.
            excerpts: 1 to `MAX_RECORDINGS` recordings.
            pause: called between pieces of work, with the seconds that the last one took. It may
                wait, to leave the processors to others, or raise to give up.

        Raises:
            VoiceError: there are too many recordings, one is too short, or they take too much of
                the model's context together.
        """
        if self.mimi.encoder is None:
            raise VoiceError("the model's codec has no encoder")
        if not 1 <= len(excerpts) <= MAX_RECORDINGS:
            raise VoiceError(f"give 1 to {MAX_RECORDINGS} recordings, got {len(excerpts)}")
        frame_samples = self.mimi.config.frame_samples
        num_positions = 0
        for i, (audio, transcript, _) in enumerate(excerpts):
            num_frames = -(-len(audio) // frame_samples)
            if num_frames < MIN_FRAMES:
                raise VoiceError(
                    f"recording {i + 1} lasts {num_frames * self.frame_s:.2f} s, at least "
                    f"{MIN_FRAMES * self.frame_s:.2f} s are needed"
                )
            num_tokens = len(self.prompts.tokens(Segment(speaker, transcript)))
            num_positions += num_tokens + num_frames + 1
        if num_positions > self.max_positions:
            seconds = sum(len(excerpt.audio) for excerpt in excerpts)
            raise VoiceError(
                f"{seconds / self.mimi.config.sample_rate_hz:.1f} s of recordings and their "
                f"transcripts take {num_positions} positions of the model's context, a voice may "
                f"have {self.max_positions}: give shorter ones"
            )
        codes = [self._encode(excerpt.audio, pause) for excerpt in excerpts]
        return Voice(
            name=name,
            speaker=speaker,
            segments=tuple(
                Segment(speaker, excerpt.transcript, part)
                for excerpt, part in zip(excerpts, codes, strict=True)
            ),
            sizes=self.sizes,
            created=int(time.time()),
            frame_s=self.frame_s,
            levels_dbfs=tuple(excerpt.level_dbfs for excerpt in excerpts),
            preview=self._preview(codes, pause),
            sample_rate_hz=self.mimi.config.sample_rate_hz,
        )

    def segments(
        self, turns: Sequence[Turn], pause: Callable[[float], None] = lambda worked_s: None
    ) -> list[Segment]:
        """Encode a decoded context.

        Args:
            turns: from `decode_context`.
            pause: see `make`.

        Raises:
            ContextError: the codec has no encoder.
        """

        def encode(audio: np.ndarray) -> Tensor:
            if self.mimi.encoder is None:
                raise ValueError("the model's codec has no encoder")
            return self._encode(audio, pause)

        return encode_context(turns, encode)

    def segment(self, speaker: int, text: str, audio: Audio) -> Segment:
        """Clean and encode a recording as context.

        Args:
            speaker: who says it.
            text: what it says.
            audio: the recording; samples are floats at the codec's sample rate.

        Raises:
            OSError: the file cannot be read.
            ValueError: the recording cannot be used, or the codec has no encoder.
        """
        if self.mimi.encoder is None:
            raise ValueError("the model's codec has no encoder")
        if isinstance(audio, np.ndarray):
            if audio.ndim != 1 or audio.dtype.kind != "f" or not np.isfinite(audio).all():
                raise ValueError("audio must be finite float samples [S]")
            sizes = self.mimi.config
            recording = Recording(audio.astype(np.float32), sizes.sample_rate_hz)
            options = PromptOptions(max_s=self.max_s)
            rates = sizes.sample_rate_hz, sizes.frame_samples
            audio = clean_prompt(recording, *rates, options)
        else:
            audio = self.excerpt(audio if isinstance(audio, bytes) else Path(audio), text).audio
        return Segment(speaker, text, self._encode(audio, lambda worked_s: None))

    def _encode(self, audio: np.ndarray, pause: Callable[[float], None]) -> Tensor:
        """Codes `[N, K]` of a recording, on the CPU: those of `Mimi.encode`."""
        frame_samples = self.mimi.config.frame_samples
        samples = torch.from_numpy(np.pad(audio, (0, -len(audio) % frame_samples)))[None]
        state = self.mimi.init_encoder_state()
        codes = []
        for piece in samples.split(PIECE_FRAMES * frame_samples, dim=1):
            started_s = time.monotonic()
            piece = piece.to(self.mimi.device)
            codes.append(self.mimi.encode_step(piece, state, self.sizes.num_codebooks)[0].cpu())
            pause(time.monotonic() - started_s)
        return torch.cat(codes)

    def _preview(self, codes: Sequence[Tensor], pause: Callable[[float], None]) -> np.ndarray:
        """The beginning of what the codes decode to, `[S]` int16."""
        num_left = int(PREVIEW_S / self.frame_s)
        audio = []
        for part in codes:
            state = self.mimi.init_state()
            for piece in part[:num_left].split(PIECE_FRAMES):
                started_s = time.monotonic()
                audio.append(self.mimi.decode_step(piece[None], state)[0].cpu().numpy())
                pause(time.monotonic() - started_s)
            num_left -= len(part[:num_left])
        return pcm16(np.concatenate(audio))
