"""Turns text and earlier speech into the backbone's input: frames of K codes and a text token."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from vox_serve.checkpoint import CheckpointError, read_json
from vox_serve.json_file import MAX_TOKENIZER_BYTES, read_bounded
from vox_serve.model_config import CsmConfig
from vox_serve.word_rules import WordRules

BOS = "<|begin_of_text|>"
EOS = "<|end_of_text|>"

CHARS_PER_POSITION = 4
"""Most characters of a text per position of the model's context. English takes about 4 per token,
and speech takes more positions than its text."""

PREFIX_SLACK_TOKENS = 64
"""Tokens by which a prefix may exceed the whole text, because the cut splits a word."""

MAX_KEPT_TEXTS = 256
MAX_KEPT_CHARS = 1024
"""Number and length of the texts whose tokens are kept."""

# With this, the library tokenizes on the calling thread. Otherwise all calls share one pool of
# threads, in which two long texts delay every other.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

_MAX_TOKENIZER_PART_BYTES = 8 << 20
_MAX_TOKENIZER_CHARS = {
    "Regex": 10_000,
    "String": 10_000,
    "content": 100,
    "prepend": 100,
    "replacement": 100,
}
"""Bounds by the key in tokenizer.json: patterns, and texts that replace a match."""


class PromptTooLongError(ValueError):
    """The prompt leaves no room for a frame in the model's context."""


@dataclass(frozen=True)
class Segment:
    """One speaker's turn.

    Attributes:
        speaker: 0 or more.
        text: passed to the model unchanged.
        codes: `[N, K]` int64, the recorded speech; None for the segment to speak.
    """

    speaker: int
    text: str
    codes: Tensor | None = None


class PromptBuilder:
    """Builds the backbone's input.

    Args:
        tokenizer: the text tokenizer. Whatever its file says, it is set to treat special-token
            strings in a text as plain text, and to neither truncate nor pad.
        config: the model's sizes.
        settings: merged JSON settings that may give `bos_token_id` and `eos_token_id`; used only
            if the tokenizer has no Llama 3 tokens.
        words: writes texts as the tokenizer's normalizer would, which it then lacks.

    Raises:
        CheckpointError: the tokenizer has no BOS or EOS, or one outside the model's vocabulary.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        config: CsmConfig,
        settings: Mapping[str, Any] | None = None,
        words: WordRules | None = None,
    ):
        self.config = config
        self._tokenizer = tokenizer
        # Otherwise "<|end_of_text|>" in a user's text would end the segment.
        tokenizer.encode_special_tokens = True
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._words = words
        self._kept_ids = lru_cache(MAX_KEPT_TEXTS)(self._ids)
        self._bos = _special_id(tokenizer, BOS, settings or {}, "bos_token")
        self._eos = _special_id(tokenizer, EOS, settings or {}, "eos_token")
        for name, token in ((BOS, self._bos), (EOS, self._eos)):
            if not 0 <= token < config.text_vocab_size:
                raise CheckpointError(
                    f"{name} is token {token}, but the model has {config.text_vocab_size} tokens"
                )

    @classmethod
    def from_folder(cls, folder: Path | str, config: CsmConfig) -> "PromptBuilder":
        """Read tokenizer.json of a checkpoint folder.

        Raises:
            CheckpointError: the file is missing or does not fit the model.
        """
        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(
                f"{folder} has no tokenizer.json: CSM uses that of Llama 3.2, which --tokenizer "
                "takes from a folder or a hub id such as meta-llama/Llama-3.2-1B"
            )
        try:
            data = read_bounded(path, MAX_TOKENIZER_BYTES)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read as a tokenizer: {error}") from None
        settings: dict[str, Any] = {}
        for name in ("generation_config.json", "config.json", "tokenizer_config.json"):
            if (folder / name).is_file():
                found = read_json(folder / name)
                settings |= {key: value for key, value in found.items() if value is not None}
        return cls.from_bytes(data, config, str(path), settings)

    @classmethod
    def from_bytes(
        cls, data: bytes, config: CsmConfig, source: str, settings: Mapping[str, Any]
    ) -> "PromptBuilder":
        """Read the content of a tokenizer.json.

        Args:
            data: the content.
            config: the model's sizes.
            source: names it in messages.
            settings: as for `PromptBuilder`.

        Raises:
            CheckpointError: it is no tokenizer, or does not fit the model.
        """
        tokenizer, words = _parse_tokenizer(data, source)
        return cls(tokenizer, config, settings, words)

    def tokens(self, segment: Segment) -> list[int]:
        """Token ids of a segment's text: BOS, `[speaker]text` or as the model wants it, EOS.

        Those of short texts are kept: a context has the same segments again and again.

        Raises:
            PromptTooLongError: the text is longer than the model's context can hold.
            ValueError: the text is empty or blank, is not valid Unicode, or has a token outside the
                model's vocabulary; or the speaker is negative.
        """
        max_chars = CHARS_PER_POSITION * self.config.backbone.max_positions
        if len(segment.text) > max_chars:
            raise PromptTooLongError(
                f"the text has {len(segment.text)} characters, and the model's context of "
                f"{self.config.backbone.max_positions} positions has room for at most {max_chars}"
            )
        if segment.speaker < 0:
            raise ValueError(f"speaker must be 0 or more, got {segment.speaker}")
        if not segment.text.strip():
            raise ValueError("text must not be empty")
        try:
            segment.text.encode()
        except UnicodeEncodeError:
            raise ValueError("text must be valid Unicode, but has a lone surrogate") from None
        encode = self._kept_ids if len(segment.text) <= MAX_KEPT_CHARS else self._ids
        if self.config.has_spaced_prompts:
            return list(encode(f"[{segment.speaker}] {segment.text.lstrip()}"))
        return list(encode(f"[{segment.speaker}]{segment.text}"))

    def _ids(self, text: str) -> tuple[int, ...]:
        """Token ids of a text between BOS and EOS."""
        ids = self._encode(text)
        if ids and max(ids) >= self.config.text_vocab_size:
            raise ValueError(
                f"text has token {max(ids)}, but the model has {self.config.text_vocab_size}"
            )
        return (self._bos, *ids, self._eos)

    def _encode(self, text: str) -> list[int]:
        """Token ids of a text.

        Some tokenizers take 0.3 ms per character. Prefixes of doubling length come first, so that a
        text with too many tokens is refused after about the work that one which fits may cost.
        """
        limit = self.config.backbone.max_positions
        end = limit // 2
        while True:
            with _panics_as_errors():
                part = self._words.normalize(text[:end]) if self._words else text[:end]
                # Unlike `encode`, this releases the GIL; the fast variant computes no offsets.
                encoded = self._tokenizer.encode_batch_fast([part], add_special_tokens=False)
            ids = encoded[0].ids
            if end >= len(text):
                return ids
            if len(ids) > limit + PREFIX_SLACK_TOKENS:
                raise PromptTooLongError(
                    f"the text takes more than {limit} positions, the model's whole context, and "
                    "must leave room for speech"
                )
            end *= 2

    def build(self, segments: Sequence[Segment]) -> tuple[Tensor, Tensor]:
        """The backbone's input for segments, oldest first.

        A segment is its text tokens, then, if it has codes, its frames and one all-zero frame.

        Args:
            segments: at least one.

        Returns:
            Frames `[T, K + 1]` int64, audio codes in columns 0..K-1 and a token in column K, and
            mask `[T, K + 1]` bool, True where a column is used.

        Raises:
            ValueError: see `tokens`; or codes have a wrong shape or are outside the vocabulary.
        """
        if not segments:
            raise ValueError("there must be at least one segment")
        parts = [part for segment in segments for part in self._segment(segment)]
        frames, masks = zip(*parts, strict=True)
        return torch.cat(frames), torch.cat(masks)

    def _segment(self, segment: Segment) -> list[tuple[Tensor, Tensor]]:
        k = self.config.num_codebooks
        tokens = torch.tensor(self.tokens(segment))
        frames = torch.zeros(len(tokens), k + 1, dtype=torch.int64)
        frames[:, k] = tokens
        mask = torch.zeros(len(tokens), k + 1, dtype=torch.bool)
        mask[:, k] = True
        if segment.codes is None:
            return [(frames, mask)]
        check_codes(segment.codes, self.config)
        spoken = torch.zeros(len(segment.codes) + 1, k + 1, dtype=torch.int64)
        spoken[:-1, :k] = segment.codes
        spoken_mask = torch.ones(spoken.shape, dtype=torch.bool)
        spoken_mask[:, k] = False
        return [(frames, mask), (spoken, spoken_mask)]


def _parse_tokenizer(data: bytes, source: str) -> tuple[Tokenizer, WordRules | None]:
    try:
        with _panics_as_errors():
            words = WordRules.find(data)
            tokenizer = Tokenizer.from_buffer(words.tokenizer_json if words else data)
            for normalizer in words.normalizers if words else [tokenizer.normalizer]:
                _check_expansion("normalizer", normalizer)
            _check_expansion("pre_tokenizer", tokenizer.pre_tokenizer)
    except Exception as error:  # the library raises bare Exceptions
        raise CheckpointError(f"{source} cannot be read as a tokenizer: {error}") from None
    return tokenizer, words


@contextmanager
def _panics_as_errors() -> Iterator[None]:
    """Turn a panic of the library, which is no `Exception`, into a ValueError.

    It panics where a regular expression of tokenizer.json exceeds the limit on backtracking.
    """
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # the class cannot be imported
            raise
        raise ValueError(f"the tokenizer fails on this text: {error}") from None


def _check_expansion(name: str, part: Any) -> None:
    """Bound the regular expressions in a part of a tokenizer, and what it inserts for each
    character of a text.

    Raises:
        ValueError: it is longer than that of any real tokenizer; the message names it.
    """
    state = part.__getstate__() if part is not None else b"{}"
    if len(state) > _MAX_TOKENIZER_PART_BYTES:
        raise ValueError(f"{name} is longer than {_MAX_TOKENIZER_PART_BYTES} bytes")
    pending: list[Any] = [json.loads(state)]
    while pending:
        item = pending.pop()
        if isinstance(item, dict):
            for key, value in item.items():
                limit = _MAX_TOKENIZER_CHARS.get(key)
                if limit and isinstance(value, str) and len(value) > limit:
                    raise ValueError(f"{name}: {key} is longer than {limit} characters")
            pending += item.values()
        elif isinstance(item, list):
            pending += item


def check_codes(codes: Tensor, config: CsmConfig) -> None:
    """Raise a ValueError unless codes are `[N, K]` int64 in the audio vocabulary."""
    v = config.audio_vocab_size
    check_codes_shape(str(codes.dtype).removeprefix("torch."), codes.shape, config)
    if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < v:
        raise ValueError(
            f"codes must be 0 to {v - 1}, got {int(codes.min())} to {int(codes.max())}"
        )


def check_codes_shape(dtype: str, shape: Sequence[int], config: CsmConfig) -> None:
    """Raise a ValueError unless dtype and shape are those of codes: int64 `[N, K]`."""
    k = config.num_codebooks
    if dtype != "int64" or len(shape) != 2 or shape[1] != k:
        raise ValueError(f"codes must be int64 [N, {k}], got {dtype} {list(shape)[:8]}")


def _special_id(tokenizer: Tokenizer, name: str, settings: Mapping[str, Any], key: str) -> int:
    """A special token's id: by its Llama 3 name, else the settings' id, else the settings' name."""
    if (token := tokenizer.token_to_id(name)) is not None:
        return token
    token = settings.get(f"{key}_id")
    if isinstance(token, list) and token:
        token = token[0]
    if isinstance(token, int) and not isinstance(token, bool):
        return token
    named = settings.get(key)
    if isinstance(named, Mapping):
        named = named.get("content")
    if isinstance(named, str) and (token := tokenizer.token_to_id(named)) is not None:
        return token
    raise CheckpointError(f"the tokenizer has no {name}, and no setting gives {key}_id")
