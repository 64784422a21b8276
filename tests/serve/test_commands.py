"""The command `vox-serve` with its subcommands, its help and its completions."""

import shutil
import subprocess
import sys

import pytest

from vox_serve import __main__ as commands
from vox_serve import completion, detect, launch, models, say, voices
from vox_serve.cluster import __main__ as cluster

MODULES = {
    "launch": launch,
    "cluster": cluster,
    "say": say,
    "voices": voices,
    "models": models,
    "detect": detect,
    "completion": completion,
}


@pytest.fixture
def called(monkeypatch):
    """The commands that were called, with their arguments."""
    found = []
    for name, module in MODULES.items():
        monkeypatch.setattr(module, "main", lambda argv, name=name: found.append((name, argv)) or 7)
    return found


@pytest.mark.parametrize("name", commands.COMMANDS)
def test_a_subcommand_gets_its_arguments(name, called):
    assert commands.main([name, "--x", "y"]) == 7
    assert called == [(name, ["--x", "y"])]


@pytest.mark.parametrize("argv", [[], ["--model", "demo"], ["--port=0", "say"]])
def test_flags_without_a_subcommand_are_launchs(argv, called):
    assert commands.main(argv) == 7
    assert called == [("launch", argv)]


def test_an_unknown_command_is_one_line(called, capsys):
    assert commands.main(["sing"]) == 2
    assert capsys.readouterr().err == "vox-serve: error: 'sing' is no command (--help lists them)\n"
    assert called == []


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_the_help_fits_a_screen(flag, called, capsys):
    assert commands.main([flag]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80
    assert [line for line in lines if line.startswith("  vox-serve say")]
    assert called == []


def test_the_module_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "vox_serve", "--help"], capture_output=True, text=True, check=True
    )
    assert done.stdout == commands.HELP


@pytest.mark.parametrize("name", commands.COMMANDS)
def test_each_command_has_help(name, capsys):
    with pytest.raises(SystemExit) as ended:
        commands.command(name)(["--help"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: vox-serve {name} ")


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_completions_have_commands_flags_and_choices(shell, capsys):
    pytest.importorskip("shtab", reason="shtab is not installed (extra: completion)")
    assert completion.main([shell]) == 0
    script = capsys.readouterr().out
    for word in (*commands.COMMANDS, "--max_batch_size", "--max-batch-size", "int8", "preview"):
        assert word in script


@pytest.mark.skipif(not shutil.which("bash"), reason="no bash")
def test_bash_completes(tmp_path):
    pytest.importorskip("shtab", reason="shtab is not installed (extra: completion)")
    script = tmp_path / "vox-serve"
    script.write_text(completion.completion("bash"))
    code = f"source {script}; COMP_WORDS=(vox-serve launch --quantize ''); COMP_CWORD=3; "
    code += "_shtab_vox_serve; echo ${COMPREPLY[@]}"
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["none", "int8", "int4"]


def test_without_shtab_it_is_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert completion.main(["bash"]) == 1
    assert capsys.readouterr().err == (
        "completion: error: this needs the package shtab: pip install shtab\n"
    )
