"""Conversations: who said what, and which turns the next one gets as context.

A data structure without a clock, a lock or a model. All positions are those of the model's context.
"""

import math
import re
import uuid
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np

ID_PATTERN = r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}"
ID_RULE = "1 to 64 letters a-z, digits, - or _, not - or _ first"

CHARS_PER_S = 13
"""Speed of speech, to estimate the length of a text that was not spoken to its end."""

NUM_STEPS = 4
"""A context begins with another turn each time that the conversation has grown by the model's
context divided by this."""

_WORD = re.compile(
    "[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\\s\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+"
)
"""A word, or a character of a script that writes no spaces."""


class UnknownConversationError(ValueError):
    """There is no such conversation."""


class ConversationExistsError(ValueError):
    """There is a conversation of this id."""


class ConversationsFullError(RuntimeError):
    """As many conversations as may be are in use."""


@dataclass(frozen=True, eq=False)
class Utterance:
    """A text and the frames in which it was spoken.

    Attributes:
        speaker: 0 or more.
        text: as the model reads it.
        codes: `[N, K]` integers.
        is_complete: the frames speak the whole text.
    """

    speaker: int
    text: str
    codes: np.ndarray
    is_complete: bool = True


@dataclass(frozen=True, eq=False)
class Turn:
    """An utterance in a conversation.

    Attributes:
        speaker: 0 or more.
        text: as the model reads it.
        codes: `[N, K]` int16 or int32.
        generated: True if the server spoke it.
        num_positions: the positions that it takes.
    """

    speaker: int
    text: str
    codes: np.ndarray
    generated: bool
    num_positions: int


def heard(utterances: Sequence[Utterance], num_frames: int, frame_s: float) -> list[Utterance]:
    """The first frames of some speech, with the words that were spoken in them.

    Args:
        utterances: spoken one after another.
        num_frames: frames that were heard.
        frame_s: duration of a frame.

    Returns:
        Complete utterances; one that was heard in part has the first words of its text, in
        proportion to its frames. Its length, if it was not spoken to its end, is estimated.
    """
    found = []
    for utterance in utterances:
        codes = utterance.codes[:num_frames]
        num_frames -= len(codes)
        if not len(codes):
            continue
        length = len(utterance.codes)
        if not utterance.is_complete:
            length = max(length, math.ceil(len(utterance.text) / CHARS_PER_S / frame_s))
        text = first_words(utterance.text, len(codes) / length)
        found.append(Utterance(utterance.speaker, text, codes))
    return found


def first_words(text: str, share: float) -> str:
    """The words that begin in the first part of a text, at least one."""
    if share >= 1:
        return text
    end = share * len(text)
    ends = [match.end() for match in _WORD.finditer(text) if match.start() < end]
    first = _WORD.search(text)
    return text[: max([*ends, first.end() if first else 0])]


@dataclass(eq=False)
class Conversation:
    """The turns of one conversation, oldest first.

    Attributes:
        id: its client's name for it.
        client: whose conversation it is.
        max_positions: of the model's context.
        voice: name of the voice that it is spoken in; None for the default one.
        turns: the last ones. Those that no context has room for are forgotten.
        num_forgotten: the turns before these.
        begin: the positions of the turns before these.
        last_used_s: time of the last use.
        num_users: requests that use it now.
        is_deleted: it was deleted, or forgotten with all turns.
        reply_turns: turns at the end that are the last answer, and may still be interrupted.
        reply_frames_forgotten: frames of that answer in turns that are forgotten.
        reply_until_s: time at which the answer has been played.
    """

    id: str
    client: str
    max_positions: int
    voice: str | None = None
    turns: list[Turn] = field(default_factory=list)
    num_forgotten: int = 0
    begin: int = 0
    last_used_s: float = 0.0
    num_users: int = 0
    is_deleted: bool = False
    reply_turns: int = 0
    reply_frames_forgotten: int = 0
    reply_until_s: float = -math.inf

    def context(self, room: int) -> list[Turn]:
        """The last turns that fit into some positions.

        Turns before a multiple of a fixed step are left out, so that the first turn of the context
        changes rarely, and the prefix cache has what follows it.

        Args:
            room: positions for the turns.
        """
        start = self._start(room)
        return [turn for at, turn in self._placed() if at >= start]

    def add(self, turn: Turn) -> None:
        """Append a turn; forget those that no later context can have."""
        self.turns.append(turn)
        self.end_reply()
        self._forget()

    def add_reply(self, turns: Sequence[Turn], until_s: float) -> None:
        """Append the turns of an answer that is being played until a time."""
        self.turns += turns
        self.reply_turns, self.reply_until_s = len(turns), until_s
        self.reply_frames_forgotten = 0
        self._forget()

    def end_reply(self) -> None:
        """Take the last answer for heard."""
        self.reply_turns = self.reply_frames_forgotten = 0

    @property
    def reply(self) -> list[Turn]:
        """The turns of the last answer, as far as they are not forgotten."""
        return self.turns[len(self.turns) - self.reply_turns :]

    def shorten_reply(self, turns: Sequence[Turn]) -> None:
        """Replace the last answer by what was heard of it."""
        del self.turns[len(self.turns) - self.reply_turns :]
        self.turns += turns
        self.end_reply()

    def _placed(self) -> Iterator[tuple[int, Turn]]:
        """The turns, each with the positions before it."""
        begins = accumulate((turn.num_positions for turn in self.turns), initial=self.begin)
        return zip(begins, self.turns, strict=False)

    def _start(self, room: int) -> int:
        """The least multiple of the step after which all positions fit into the room."""
        end = self.begin + sum(turn.num_positions for turn in self.turns)
        step = max(self.max_positions // NUM_STEPS, 1)
        return max(0, -(-(end - room) // step) * step)

    def _forget(self) -> None:
        start = self._start(self.max_positions)
        num_forgotten = sum(at < start for at, _ in self._placed())
        for turn in self.turns[:num_forgotten]:
            self.begin += turn.num_positions
            if self.reply_turns == len(self.turns):
                self.reply_turns -= 1
                self.reply_frames_forgotten += len(turn.codes)
            self.turns.pop(0)
        self.num_forgotten += num_forgotten


class Conversations:
    """The conversations of all clients. Only the event loop uses it.

    Each client has ids of its own. Conversations that nobody used for a time are deleted. When
    there is no room, the client with the most gives up its least recently used one.

    Args:
        max_number: most conversations.
        idle_s: time after which one is deleted.
        max_positions: of the model's context.
        clock: the time in seconds.

    Attributes:
        clock: see the arguments.
    """

    def __init__(
        self, max_number: int, idle_s: float, max_positions: int, clock: Callable[[], float]
    ) -> None:
        self.max_number = max_number
        self.max_positions = max_positions
        self.idle_s = idle_s
        self.clock = clock
        # The least recently used one first.
        self._kept: OrderedDict[tuple[str, str], Conversation] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def find(self, client: str, key: str) -> Conversation | None:
        """A client's conversation; None if there is none."""
        self.expire()
        conversation = self._kept.get((client, key))
        if conversation is not None:
            self.touch(conversation)
        return conversation

    def peek(self, client: str, key: str) -> Conversation | None:
        """A client's conversation, without a use of it; None if there is none."""
        return self._kept.get((client, key))

    def get(self, client: str, key: str) -> Conversation:
        """A client's conversation.

        Raises:
            UnknownConversationError: there is none.
        """
        if (conversation := self.find(client, key)) is None:
            raise UnknownConversationError(f"there is no conversation {key[:100]}")
        return conversation

    def create(self, client: str, key: str | None = None, voice: str | None = None) -> Conversation:
        """Begin a conversation.

        Args:
            client: whose it is.
            key: its id; None for a new one.
            voice: name of its voice.

        Raises:
            ValueError: the id is no id.
            ConversationExistsError: there is one of this id.
            ConversationsFullError: there is no room.
        """
        if key is None:
            key = str(uuid.uuid4())
        if not re.fullmatch(ID_PATTERN, key):
            raise ValueError(f"a conversation's id must be {ID_RULE}")
        self.expire()
        if (client, key) in self._kept:
            raise ConversationExistsError(f"there is a conversation {key}")
        while len(self._kept) >= self.max_number:
            self._make_room()
        conversation = Conversation(key, client, self.max_positions, voice)
        self._kept[client, key] = conversation
        self.touch(conversation)
        return conversation

    def remove(self, client: str, key: str) -> None:
        """Delete a client's conversation.

        Raises:
            UnknownConversationError: there is none.
        """
        self._drop(self.get(client, key))

    def touch(self, conversation: Conversation) -> None:
        """Note a use."""
        if not conversation.is_deleted:
            conversation.last_used_s = self.clock()
            self._kept.move_to_end((conversation.client, conversation.id))

    def expire(self) -> None:
        """Delete what nobody used for too long."""
        limit = self.clock() - self.idle_s
        expired = []
        for conversation in self._kept.values():
            if conversation.last_used_s > limit:
                break
            if not conversation.num_users:
                expired.append(conversation)
        for conversation in expired:
            self._drop(conversation)

    def _make_room(self) -> None:
        counts = Counter(client for client, _ in self._kept)
        idle = [c for c in self._kept.values() if not c.num_users]
        if not idle:
            raise ConversationsFullError(f"all {len(self._kept)} conversations are in use")
        self._drop(max(idle, key=lambda c: counts[c.client]))

    def _drop(self, conversation: Conversation) -> None:
        conversation.is_deleted = True
        del self._kept[conversation.client, conversation.id]
        conversation.turns.clear()
        conversation.end_reply()
