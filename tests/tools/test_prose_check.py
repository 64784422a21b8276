"""prose_check finds each planted habit at its line and passes plain English."""

import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "prose_check.py"


def check(folder: Path, name: str, text: str) -> subprocess.CompletedProcess[str]:
    """Run the tool in a repository with one file."""
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    (folder / name).write_text(text)
    subprocess.run(["git", "add", name], cwd=folder, check=True)
    return subprocess.run([sys.executable, TOOL], cwd=folder, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("name", "text", "line", "advice"),
    [
        ("a.h", "// Of a block.\nint x;\n", 1, "name the thing"),
        ("a.cuh", "int x;\n// What a lane holds.\n", 2, "a clause as a noun"),
        ("a.cu", "int x;  // Whether there is one\n", 1, "a clause as a noun"),
        ("a.cpp", "// How many rows there are.\n", 1, "a clause as a noun"),
        ("a.cpp", "// Where the rows begin.\n", 1, "a clause as a noun"),
        ("a.cpp", "// Rows.\n// The norm behind them.\n", 2, "after, below"),
        ("a.cpp", "// The kernel in front writes it.\n", 1, "previous"),
        ("a.cpp", "// Loads that are under\n// way.\n", 1, "in flight"),
        ("a.cpp", "// A thread asks for a tile.\n", 1, "loads"),
        ("a.cpp", '// "x" // asks no more which are there\n', 1, "needs no"),
        ("a.cpp", "// Reckoned microseconds.\n", 1, "estimate"),
        ("a.cpp", "// Read anew.\n", 1, "again"),
        ("a.cpp", "// The row that is to be drawn.\n", 1, "must be"),
        ("a.cpp", "// Splits are put together.\n", 1, "combine"),
        ("a.cpp", "// Pairs turned by an angle.\n", 1, "rotated"),
        ("a.cpp", "// In the second-level cache.\n", 1, "L2"),
        ("a.cpp", "// In the level-1 cache.\n", 1, "L1"),
        ("a.py", '"""What both share."""\n', 1, "a clause as a noun"),
        ("a.py", 'def f():\n    """Of a block."""\n', 2, "name the thing"),
        ("a.py", 'X = 1\n"""Of a block."""\n', 2, "name the thing"),
        ("a.py", "x = 1\nx = 2  # not to be had\n", 2, "unavailable"),
        ("a.md", "# A voice\n\nIt mistakes words.\n", 3, "word error rate"),
        ("Makefile", "# Built anew.\nall:\n", 1, "again"),
        ("CMakeLists.txt", 'set(x "#")  # Built anew.\n', 1, "again"),
    ],
)
def test_finds(tmp_path, name, text, line, advice):
    result = check(tmp_path, name, text)
    assert result.returncode == 1
    assert result.stdout.count("\n") == 1
    assert result.stdout.startswith(f"{name}:{line}: ")
    assert advice in result.stdout


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.h", "// Block-wide sum.\nint behind = 1;  // in (0, 1)\n"),
        ("a.cpp", 'const char* s = "// asks for";\nint asks_for = 1;\n'),
        ("a.cpp", "// Rows that fall behind are dropped. Calls `is to be`.\n"),
        ("a.cpp", "// Where a key is missing, the score is -inf.\n"),
        ("a.py", '"""Is it there?"""\ns = "What both share"\nx = s  # How many?\n'),
        ("a.py", '"""How to build the voice."""\n# Of course.\n'),
        ("a.py", "# One.\n\nx = 1\n# Two: a server behind a proxy.\n"),
        ("a.md", "# What has run\n\n`asks for`\n\n```\nbehind\n```\n"),
        ("a.txt", "What both share, behind.\n"),
    ],
)
def test_passes(tmp_path, name, text):
    result = check(tmp_path, name, text)
    assert (result.returncode, result.stdout) == (0, ""), result.stdout + result.stderr
