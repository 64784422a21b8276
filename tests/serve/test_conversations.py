"""Conversations as data: which turns a context has, what was heard, who gives up a conversation."""

import numpy as np
import pytest

from vox_serve.conversations import (
    Conversation,
    ConversationExistsError,
    Conversations,
    ConversationsFullError,
    Turn,
    UnknownConversationError,
    Utterance,
    first_words,
    heard,
)

FRAME_S = 0.08


def turn(num_positions: int, name: str = "", num_frames: int = 1, generated: bool = True) -> Turn:
    return Turn(0, name, np.zeros((num_frames, 2), np.int16), generated, num_positions)


def conversation(lengths: str, max_positions: int = 400) -> Conversation:
    """Turns a, b, c, ... of some lengths; a step has a quarter of `max_positions`."""
    found = Conversation("id", "client", max_positions)
    for name, length in zip("abcdefghijklmnopqrstuvwxyz", lengths.split(), strict=False):
        found.add(turn(int(length), name))
    return found


def names(turns) -> str:
    return "".join(turn.text for turn in turns)


# Steps of 100 positions. Turns begin at the sums of the lengths before them.
@pytest.mark.parametrize(
    ("lengths", "room", "kept"),
    [
        ("", 300, ""),
        ("100 100 100", 300, "abc"),  # just fits
        ("100 100 101", 300, "bc"),  # 1 too many: a whole step goes
        ("50 50 100 101", 300, "cd"),
        ("90 90 90 90", 300, "cd"),  # b begins at 90, before 100
        ("90 90 90 90", 360, "abcd"),
        ("90 90 90 90", 199, "d"),
        ("350 10", 300, "b"),
        ("10 350", 300, ""),  # the last turn alone has no room
        ("10 350 10", 300, "c"),
        ("100 100 100", 0, ""),
    ],
)
def test_the_last_turns_that_fit(lengths, room, kept):
    assert names(conversation(lengths).context(room)) == kept


def test_the_start_stays_while_turns_are_added():
    """So that the prefix cache has all but the last turn."""
    growing = Conversation("id", "client", 400)
    starts = []
    for i in range(40):
        growing.add(turn(20, str(i)))
        starts.append(growing.context(300)[0].text)
    assert starts[:15] == ["0"] * 15
    changes = [i for i in range(1, 40) if starts[i] != starts[i - 1]]
    assert changes == [15, 20, 25, 30, 35]
    assert starts[15::5] == ["5", "10", "15", "20", "25"]


def test_less_room_now_is_no_less_later():
    found = conversation("90 90 90 90")
    assert names(found.context(100)) == ""
    assert names(found.context(400)) == "abcd"


def test_turns_that_no_context_can_have_are_forgotten_and_the_steps_stay():
    found = conversation(" ".join(["90"] * 20))
    whole = Conversation("id", "client", 400)
    whole.turns = [turn(90, name) for name in "abcdefghijklmnopqrst"]
    assert (len(found.turns), found.num_forgotten, found.begin) == (4, 16, 16 * 90)
    for room in range(0, 401, 10):
        assert names(found.context(room)) == names(whole.context(room)), room


@pytest.mark.parametrize(
    ("text", "share", "kept"),
    [
        ("One two three four.", 1, "One two three four."),
        ("One two three four.", 0.5, "One two three"),
        ("One two three four.", 0.4, "One two"),
        ("One two three four.", 0, "One"),
        ("  One two", 0, "  One"),
        ("你好世界。再见", 0.5, "你好世界"),
        ("alone", 0.1, "alone"),
    ],
)
def test_words_in_proportion(text, share, kept):
    assert first_words(text, share) == kept


def spoken(text: str, num_frames: int, **fields) -> Utterance:
    codes = np.arange(num_frames)[:, None].repeat(2, 1)
    return Utterance(0, text, codes, **fields)


PARTS = [spoken("One two.", 10), spoken("Three four.", 10)]


@pytest.mark.parametrize(
    ("num_frames", "expected"),
    [
        (0, []),
        (1, [("One", 1)]),
        (5, [("One", 5)]),
        (10, [("One two.", 10)]),
        (11, [("One two.", 10), ("Three", 1)]),
        (20, [("One two.", 10), ("Three four.", 10)]),
        (99, [("One two.", 10), ("Three four.", 10)]),
    ],
)
def test_what_was_heard(num_frames, expected):
    found = heard(PARTS, num_frames, FRAME_S)
    assert [(u.text, len(u.codes)) for u in found] == expected


def test_the_length_of_unfinished_speech_is_estimated():
    """26 characters last 2 s: 25 frames."""
    text = "Aaaa bbbb cccc dddd eeee f"
    assert heard([spoken(text, 10, is_complete=False)], 10, FRAME_S)[0].text == "Aaaa bbbb cccc"
    assert heard([spoken(text, 10)], 10, FRAME_S)[0].text == text
    assert heard([spoken(text, 30, is_complete=False)], 15, FRAME_S)[0].text == "Aaaa bbbb cccc"


def test_a_reply_that_is_partly_forgotten_can_be_shortened():
    found = conversation("50")
    found.add_reply([turn(150, name, num_frames=100) for name in "vwxyz"], until_s=1)
    assert (names(found.reply), found.reply_frames_forgotten) == ("yz", 300)
    found.shorten_reply([turn(5, "x")])
    assert names(found.turns) == "x"
    assert not found.reply


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def kept(clock) -> Conversations:
    return Conversations(3, 100, 400, clock)


def test_idle_conversations_end(kept, clock):
    kept.create("a", "x")
    busy = kept.create("a", "y")
    busy.num_users = 1
    clock.now_s = 50
    kept.create("a", "z")
    kept.get("a", "x")
    clock.now_s = 149
    kept.expire()
    assert len(kept) == 3
    clock.now_s = 150
    assert kept.find("a", "x") is None
    assert kept.find("a", "z") is None
    assert kept.get("a", "y") is busy


def test_each_client_has_its_own_ids(kept):
    mine = kept.create("a", "x")
    with pytest.raises(UnknownConversationError, match="no conversation x"):
        kept.get("b", "x")
    assert kept.create("b", "x") is not mine
    with pytest.raises(ConversationExistsError):
        kept.create("a", "x")
    kept.remove("a", "x")
    assert mine.is_deleted
    assert kept.find("b", "x") is not None


def test_the_client_with_the_most_makes_room(kept, clock):
    for clock.now_s, (client, key) in enumerate([("b", "1"), ("a", "1"), ("a", "2")]):
        kept.create(client, key)
    kept.get("a", "1")
    kept.create("b", "2")
    assert kept.find("a", "2") is None  # not the older one of b, nor the one just used
    for conversation in kept._kept.values():
        conversation.num_users = 1
    with pytest.raises(ConversationsFullError):
        kept.create("c", "1")


@pytest.mark.parametrize("key", ["", "a/b", "..", "-a", "a" * 65, "ä", "a b", "a\n"])
def test_ids(key, kept):
    with pytest.raises(ValueError, match="id must be"):
        kept.create("a", key)
    assert len(kept.create("a").id) == 36
