"""A conversation in a file, as `say --conversation` keeps it."""

import json

import numpy as np
import pytest

from checkpoints import TinyShape, build_tiny
from vox_serve.cli import CommandError
from vox_serve.context_segment import ContextError
from vox_serve.loading import load_engine
from vox_serve.turns_file import Turn, append_turns, load_turns


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    return load_engine(str(build_tiny(TinyShape()).write(tmp_path_factory.mktemp("model"))))


def load(path, engine):
    return load_turns(path, engine.mimi, engine.prompts.config, 100)


def codes(num_frames: int) -> np.ndarray:
    return np.arange(num_frames * 4).reshape(num_frames, 4) % 7 + 1


def test_turns_are_added_and_found_again(engine, tmp_path):
    path = tmp_path / "chat.json"
    assert load(path, engine) == []
    append_turns(path, [Turn(0, "Grüße?", codes(3))])
    append_turns(path, [Turn(1, "Yes.", codes(2)), Turn(1, "No.", codes(1))])
    turns = load(path, engine)
    assert [(turn.speaker, turn.text) for turn in turns] == [(0, "Grüße?"), (1, "Yes."), (1, "No.")]
    assert [turn.codes.tolist() for turn in turns] == [codes(n).tolist() for n in (3, 2, 1)]
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "chat-1.npy", "chat-2.npy", "chat-3.npy", "chat.json"
    ]  # fmt: skip


def test_an_existing_file_of_codes_is_kept(engine, tmp_path):
    (tmp_path / "chat-1.npy").write_bytes(b"mine")
    append_turns(tmp_path / "chat.json", [Turn(0, "a", codes(1))])
    assert (tmp_path / "chat-1.npy").read_bytes() == b"mine"
    assert json.loads((tmp_path / "chat.json").read_text())[0]["codes"] == "chat-2.npy"


def test_recordings_in_the_file_stay(tmp_path):
    path = tmp_path / "chat.json"
    entry = {"speaker": 1, "text": "Hi.", "audio": "hi.wav"}
    path.write_text(json.dumps([entry]))
    append_turns(path, [Turn(0, "a", codes(1))])
    assert json.loads(path.read_text())[0] == entry


@pytest.mark.parametrize("content", ["{}", "3", "nonsense"])
def test_a_file_of_another_kind_is_refused(content, engine, tmp_path):
    path = tmp_path / "chat.json"
    path.write_text(content)
    with pytest.raises(ContextError):
        load(path, engine)
    with pytest.raises(ValueError):  # noqa: PT011
        append_turns(path, [Turn(0, "a", codes(1))])
    assert path.read_text() == content


def test_a_folder_that_is_missing_is_one_line(tmp_path):
    with pytest.raises(CommandError, match=r"cannot write .*: No such file or directory"):
        append_turns(tmp_path / "none" / "chat.json", [Turn(0, "a", codes(1))])
