"""A failed output leaves the old file and nothing else; a closed or full stream gives one line."""

import errno
import io
import os
import resource
import shlex
import stat
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from fake_engine import FakeEngine, expected_pcm
from forked_python import python
from vox_serve import atomic_file, say
from vox_serve.atomic_file import atomic_write
from vox_serve.audio import wav_file
from vox_serve.cli import one_line

ROOT = Path(__file__).parents[2]
COMMANDS = {
    "$SAY": f"{sys.executable} -m vox_serve.say",
    "$LAUNCH": f"{sys.executable} -m vox_serve.launch",
}
TIMEOUT_S = 120
OLD = b"the old file"
WAV = wav_file(expected_pcm("hello", 3))


@pytest.fixture(autouse=True)
def _fake(monkeypatch):
    monkeypatch.setattr(say, "make_engine", lambda *_, **__: FakeEngine())


@pytest.fixture
def old(tmp_path) -> Path:
    """A folder of its own with an old WAV in it."""
    folder = tmp_path / "out"
    folder.mkdir()
    path = folder / "out.wav"
    path.write_bytes(OLD)
    return path


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def assert_one_line(text: str, *said: str) -> None:
    (line,) = text.splitlines()
    assert all(words in line for words in said), line


@pytest.mark.parametrize("limit", [0, 1, 43, 44, 4096, len(WAV) - 1])
def test_a_full_disk_leaves_the_old_file(old, limit, capsys):
    """A limit on file sizes fails a write wherever we like, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        code = say.main(["hello", "-o", str(old)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 1
    assert_one_line(capsys.readouterr().err, "say: error: cannot write", str(old))
    assert old.read_bytes() == OLD
    assert listing(old.parent) == ["out.wav"]


@pytest.mark.parametrize("call", ["fsync", "replace", "fchmod", "open"])
def test_any_call_that_fails_leaves_the_old_file(old, call, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    place = "builtins.open" if call == "open" else f"vox_serve.atomic_file.os.{call}"
    with monkeypatch.context() as patch:
        patch.setattr(place, full)
        code = say.main(["hello", "-o", str(old)])
    assert code == 1
    assert_one_line(capsys.readouterr().err, "cannot write", "No space left on device")
    assert old.read_bytes() == OLD
    assert listing(old.parent) == ["out.wav"]


def test_two_outputs_are_replaced_together_or_not_at_all(old, capsys):
    codes = old.with_name("codes.npy")
    codes.write_bytes(OLD)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # enough for the frames alone
    try:
        assert say.main(["hello", "-o", str(old), "--codes", str(codes)]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (old.read_bytes(), codes.read_bytes()) == (OLD, OLD)
    assert listing(old.parent) == ["codes.npy", "out.wav"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupt_while_writing_leaves_nothing(old, error):
    def write_half():
        with atomic_write(old) as file:
            file.write(b"half")
            raise error

    with pytest.raises(error):
        write_half()
    assert old.read_bytes() == OLD
    assert listing(old.parent) == ["out.wav"]


def test_a_failure_of_the_engine_touches_no_file(old, monkeypatch):
    monkeypatch.setattr(say, "make_engine", lambda *_, **__: FakeEngine(fail_at_step=1))
    assert say.main(["hello", "-o", str(old)]) == 1
    assert old.read_bytes() == OLD
    assert listing(old.parent) == ["out.wav"]


def test_mode_links_and_umask(old):
    old.chmod(0o640)
    link = old.with_name("link.wav")
    link.symlink_to(old.name)
    assert say.main(["hello", "-o", str(link)]) == 0
    assert link.is_symlink()
    assert old.read_bytes() == WAV
    assert stat.S_IMODE(old.stat().st_mode) == 0o640
    dangling = old.with_name("dangling.wav")
    dangling.symlink_to("new.wav")
    before = os.umask(0o027)
    try:
        assert say.main(["hello", "-o", str(dangling)]) == 0
    finally:
        os.umask(before)
    new = old.with_name("new.wav")
    assert new.read_bytes() == WAV
    assert stat.S_IMODE(new.stat().st_mode) == 0o640
    assert listing(old.parent) == ["dangling.wav", "link.wav", "new.wav", "out.wav"]


def test_a_name_of_the_longest_length(tmp_path):
    path = tmp_path / ("é" * 125 + ".wav")
    assert say.main(["hello", "-o", str(path)]) == 0
    assert path.read_bytes() == WAV


def test_an_owner_is_kept_where_that_is_allowed(old):
    if os.geteuid():
        pytest.skip("only root may give files away")
    os.chown(old, 12345, 12346)
    assert say.main(["hello", "-o", str(old)]) == 0
    assert (old.stat().st_uid, old.stat().st_gid) == (12345, 12346)


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS])
def test_a_file_in_a_folder_that_takes_no_new_one_is_written_in_place(old, code, monkeypatch):
    def refuse(path):
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(atomic_file, "new_beside", refuse)
    inode = old.stat().st_ino
    assert say.main(["hello", "-o", str(old)]) == 0
    assert (old.read_bytes(), old.stat().st_ino) == (WAV, inode)
    assert say.main(["hello", "-o", str(old.with_name("new.wav"))]) == 1


def test_long_speech_needs_no_folder_that_takes_files(old, monkeypatch):
    monkeypatch.setattr(say.os, "access", lambda path, mode: path != old.parent)
    assert say._folder_of(str(old)) is None
    monkeypatch.undo()
    assert say._folder_of(str(old)) == str(old.parent)


def test_a_file_that_is_a_mount_point_is_written_in_place(old, monkeypatch):
    def busy(*_):
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    monkeypatch.setattr(atomic_file.os, "replace", busy)
    inode = old.stat().st_ino
    assert say.main(["hello", "-o", str(old)]) == 0
    assert (old.read_bytes(), old.stat().st_ino) == (WAV, inode)
    assert listing(old.parent) == ["out.wav"]


def test_special_files_are_written_directly(tmp_path):
    assert say.main(["hello", "-o", "/dev/null", "--codes", "/dev/null"]) == 0
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    read = []
    reader = threading.Thread(target=lambda: read.append(fifo.read_bytes()), daemon=True)
    reader.start()
    assert say.main(["hello", "-o", str(fifo)]) == 0
    reader.join(TIMEOUT_S)
    assert read == [WAV]
    assert stat.S_ISFIFO(fifo.stat().st_mode)
    assert listing(tmp_path) == ["fifo"]


def test_codes_to_stdout(capfdbinary, tmp_path):
    wav = tmp_path / "out.wav"
    assert say.main(["hello", "-o", str(wav), "--codes", "-"]) == 0
    assert np.load(io.BytesIO(capfdbinary.readouterr().out)).shape == (3, 4)
    assert wav.read_bytes() == WAV
    assert listing(tmp_path) == ["out.wav"]


def same_names(folder: Path) -> list[tuple[str, str]]:
    file = folder / "file"
    file.touch()
    (folder / "link").symlink_to("file")
    (folder / "hard").hardlink_to(file)
    (folder / "dangling").symlink_to("new")
    (folder / "sub").mkdir()
    (folder / "here").symlink_to(".")
    return [
        ("-", "-"),
        ("new", "new"),
        ("new", "./new"),
        ("new", "sub/../new"),
        ("new", "here/new"),
        ("new", str(folder / "new")),
        ("dangling", "new"),
        ("file", "link"),
        ("hard", "file"),
    ]


def test_one_file_for_both_outputs_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(say, "make_engine", None)
    monkeypatch.chdir(tmp_path)
    for a, b in same_names(tmp_path):
        for output, codes in ((a, b), (b, a)):
            with pytest.raises(SystemExit) as stop:
                say.main(["hello", "-o", output, "--codes", codes])
            assert stop.value.code == 2
            assert_one_line(capsys.readouterr().err, "-o and --codes name the same file")
    assert not (tmp_path / "new").exists()


def run_shell(line: str, **options) -> subprocess.CompletedProcess:
    """Run a shell line; $FAKE stands for `say` with the fake engine."""
    fake = [*python(), str(ROOT / "tests" / "support" / "say_fake.py")]
    for name, command in {**COMMANDS, "$FAKE": shlex.join(fake)}.items():
        line = line.replace(name, command)
    paths = os.pathsep.join(filter(None, sys.path))
    return subprocess.run(
        ["bash", "-c", line],
        capture_output=True,
        timeout=TIMEOUT_S,
        env={**os.environ, "PYTHONPATH": paths},
        **options,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        ("$SAY -o out.wav <&-", 1, "stdin is closed"),
        ("$SAY hello -o - >&-", 1, "stdout is closed"),
        ("$FAKE hello -o - > /dev/full", 1, "cannot write stdout: No space left"),
        ("$FAKE hello -o /dev/full", 1, "cannot write /dev/full: No space left"),
        ("$SAY hello -o out --codes - > out", 2, "name the same file"),
        ("$SAY --help >&-", 1, "stdout is closed"),
        ("$SAY --help > /dev/full", 1, "cannot write stdout: No space left"),
        ("$LAUNCH --help >&-", 1, "stdout is closed"),
    ],
)
def test_a_closed_or_full_stream_is_one_line(line, code, said, tmp_path):
    result = run_shell(line, cwd=tmp_path)
    assert_one_line(result.stderr.decode(), said)
    assert result.returncode == code
    assert not (tmp_path / "out.wav").exists()


@pytest.mark.slow
def test_closed_streams_that_are_not_needed_do_no_harm(tmp_path):
    """No file of the program may become descriptor 0, 1 or 2, where others would write to it."""
    result = run_shell("$FAKE hello -o out.wav <&- >&- 2>&-", cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, b"")
    assert (tmp_path / "out.wav").read_bytes() == WAV
    result = run_shell("$FAKE hello -o - 2>&-", cwd=tmp_path)
    assert (result.returncode, result.stdout) == (0, WAV)


@pytest.mark.slow
@pytest.mark.parametrize(
    "line",
    ["$FAKE hello -o -", "$SAY --help", "$LAUNCH --help"],
)
def test_a_closed_pipe_is_silent(line):
    result = run_shell(f"set -o pipefail; {line} | true; echo ${{PIPESTATUS[0]}}")
    assert result.stderr == b""
    # The writer may be done before the reader closes the pipe.
    assert result.stdout.split() in ([b"141"], [b"0"])


@pytest.mark.slow
def test_stdout_in_a_file_keeps_its_descriptor(tmp_path):
    line = "(echo first; $FAKE hello -o /dev/stdout; echo last) >> out"
    assert run_shell(line, cwd=tmp_path).returncode == 0
    assert (tmp_path / "out").read_bytes().endswith(b"last\n")


def test_five_megabytes_on_stdin_are_one_line(tmp_path):
    """And an endless stdin too: no more is read than the limit allows."""
    for source in ("head -c 5000000 /dev/zero | tr '\\0' 1", "yes"):
        result = run_shell(f"{source} | $SAY -o out.wav", cwd=tmp_path)
        assert result.returncode == 2
        assert_one_line(result.stderr.decode(), "at most 100000 characters")


def test_a_text_of_just_the_limit_is_read_whole(monkeypatch, tmp_path):
    monkeypatch.setenv("VOX_SERVE_MAX_TEXT_CHARS", "5")
    engine = FakeEngine()
    monkeypatch.setattr(say, "make_engine", lambda *_, **__: engine)
    for text in ("hello", "👩" * 5):
        stdin = io.TextIOWrapper(io.BytesIO(f"{text}\r\n".encode()))
        monkeypatch.setattr(sys, "stdin", stdin)
        assert say.main(["-o", str(tmp_path / "out.wav")]) == 0
        assert engine.requests.pop().text == text
    for stdin_text in (b"hello!", "👩".encode() * 6):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin_text)))
        with pytest.raises(SystemExit):
            say.main(["-o", str(tmp_path / "out.wav")])
    with pytest.raises(SystemExit):
        say.main(["hello!", "-o", str(tmp_path / "out.wav")])


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ("red \x1b[31m \x07", "red \\x1b[31m \\x07"),
        ("two\nlines\ttabs", "two lines tabs"),
        ("\u202eevil\u2066 \x9b2J \x7f", "\\u202eevil\\u2066 \\x9b2J \\x7f"),
        ("lone \ud800", "lone \\ud800"),
        ("Grüße 你好 👩", "Grüße 你好 👩"),
    ],
)
def test_messages_do_not_control_the_terminal(message, line):
    assert one_line(message) == line


def test_a_huge_message_is_shortened():
    assert len(one_line("word " * 10**7)) <= 500
    assert len(one_line("x" * 10**8)) <= 500
