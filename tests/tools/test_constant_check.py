"""constant_check finds a planted double and passes constants that only look alike."""

import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "constant_check.py"


def check(folder: Path, *texts: str) -> subprocess.CompletedProcess[str]:
    """Run the tool on files with these texts."""
    files = [folder / f"{i}.cuh" for i in range(len(texts))]
    for file, text in zip(files, texts, strict=True):
        file.write_text(text)
    return subprocess.run([sys.executable, TOOL, *files], capture_output=True, text=True)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("constexpr int kRows = 8;\n", "constexpr int kRows = 16;\n"),
        ("constexpr int kRows = 8;\n", "void f() {\n  static constexpr int64_t kRows = 9;\n}\n"),
        ("constexpr int kRows = f(1, 2), kB = 1;\n", "constexpr int kA = 8, kRows = f(1, 3);\n"),
        ("constexpr int kRows[] = {1, 2};\n", "constexpr int kRows[] = {1, 3};\n"),
        ("template <int L>\nconstexpr int kRows = L > 2 ? 1 : 2;\n", "constexpr bool kRows = 1;\n"),
    ],
)
def test_a_second_value_is_found(tmp_path, first, second):
    result = check(tmp_path, first, second)
    assert result.returncode == 1
    assert all(f"{i}.cuh" in result.stdout for i in range(2))
    assert {line.split(" = ")[0] for line in result.stdout.splitlines()} == {"kRows"}


def test_the_cuda_sources_have_none():
    result = subprocess.run([sys.executable, TOOL], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "")


def test_equal_values_and_passed_on_names_pass(tmp_path):
    result = check(
        tmp_path,
        "constexpr int kRows = 8;  // constexpr int kRows = 9;\n",
        "constexpr int kRows = 8, kColumns = kRows / 2;\nconstexpr int kColumns = kRows / 2;\n",
        "struct A {\n  static constexpr int kRows = kRows_;\n};\n",
        "#ifdef X\nconstexpr int kSize = 1;\n#else\nconstexpr int kSize = 2;\n#endif\n",
        "constexpr int kRows = Tile<8>::kRows;\ntemplate <int kColumns>\nint f(int kRows = 3);\n",
    )
    assert (result.returncode, result.stdout) == (0, "")
