"""Find habits of unidiomatic English in comments, docstrings and docs.

    python tools/prose_check.py [file or folder ...]

Scans the tracked Python, C++, CUDA, Markdown, Make and CMake files (all by default) and prints
`file:line: habit -> plainer words` for every match. Exits with 1 if there is one. Code, string
literals that are not docstrings, and code in Markdown are not scanned. docs/ and CONTRIBUTING.md
say how to write; this script only knows habits that the project once had.
"""

import argparse
import ast
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

C_SUFFIXES = {".h", ".cpp", ".cu", ".cuh"}
HASH_SUFFIXES = {".cmake"}
HASH_NAMES = {"Makefile", "CMakeLists.txt"}

# Anywhere in prose, and the words to use instead.
PHRASES = (
    (r"(?<!fall )(?<!falls )(?<!lag )(?<!lags )(?<!left )behind(?! an? )", "after, below or past"),
    (r"in front(?!-end| end)", "previous, before"),
    (r"under way", "in flight, in progress"),
    (r"asks for", "loads, issues, requests, takes"),
    (r"asks no more", "needs no"),
    (r"reckon(?:s|ed|ing)?", "estimate"),
    (r"anew", "again"),
    (r"(?:is|are) to be(?! (?:found|expected)\b)", "must be, will be"),
    (r"not to be had", "unavailable"),
    (r"put(?:s|ting)? together", "combine, reduce"),
    (r"turned (?:by|keys|heads|pairs|queries)", "rotated"),
    (r"(?:second-level|level-2) cache", "L2"),
    (r"(?:first-level|level-1) cache", "L1"),
    (r"mistak(?:es?|ing|en) words", "word error rate"),
)
# At the start of a comment or docstring.
STARTS = (
    (r"Of (?!course\b)", 'no head: name the thing ("Block-wide sum.")'),
    (r"(?:What|Where|Whether|How)\b(?! to\b)", "a clause as a noun: name the thing"),
)


class Prose(NamedTuple):
    """A comment, a docstring or a paragraph."""

    line: int
    text: str
    has_start: bool = True  # False if a start means nothing, as in Markdown


class Finding(NamedTuple):
    path: Path
    line: int
    habit: str
    instead: str


def joined(lines: list[tuple[int, str]]) -> Iterator[Prose]:
    """Adjacent comment lines as one text; an empty comment line ends a paragraph."""
    start, text, last = 0, [], 0
    for line, comment in [*lines, (-1, "")]:
        if text and (line != last + 1 or not comment):
            yield Prose(start, "\n".join(text))
            text = []
        if comment:
            start = start if text else line
            text.append(comment)
        last = line


def python_prose(source: str) -> Iterator[Prose]:
    comments, code_lines = [], set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        line = token.start[0]
        if token.type == tokenize.COMMENT:
            if line in code_lines:  # behaves as its own paragraph, next to code
                yield Prose(line, token.string.lstrip("#!").strip())
            else:
                comments.append((line, token.string.lstrip("#!").strip()))
        elif token.string.strip():
            code_lines.add(line)
    yield from joined(comments)
    # A string that is a statement is a docstring: of a module, class, function or constant.
    for node in ast.walk(ast.parse(source)):
        value = node.value if isinstance(node, ast.Expr) else None
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            yield Prose(value.lineno, value.value)


def marked_prose(source: str, pattern: str) -> Iterator[Prose]:
    """Comments by a regular expression whose group 1 is the code before and 2 the text."""
    comments = []
    for line, text in enumerate(source.splitlines(), 1):
        if found := re.match(pattern, text):
            before, comment = found[1].strip(), found[2].strip()
            if before:
                yield Prose(line, comment)
            else:
                comments.append((line, comment))
    yield from joined(comments)


def markdown_prose(source: str) -> Iterator[Prose]:
    lines, fenced = [], False
    for line, text in enumerate(source.splitlines(), 1):
        if text.lstrip().startswith("```"):
            fenced = not fenced
        elif not fenced:
            lines.append((line, re.sub(r"`[^`]*`", "``", text).strip()))
    for prose in joined(lines):
        yield prose._replace(has_start=False)


def prose_of(path: Path) -> Iterator[Prose]:
    source = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        return python_prose(source)
    if path.suffix == ".md":
        return markdown_prose(source)
    if path.suffix in C_SUFFIXES:
        return marked_prose(source, r'((?:[^"/]|/(?!/)|"(?:[^"\\]|\\.)*")*)//+(.*)')
    return marked_prose(source, r'((?:[^"#]|"(?:[^"\\]|\\.)*")*)#+(.*)')


def is_scanned(path: Path) -> bool:
    suffixes = {".py", ".md", *C_SUFFIXES, *HASH_SUFFIXES}
    return path.suffix in suffixes or path.name in HASH_NAMES


def habits_in(prose: Prose) -> Iterator[tuple[int, str, str]]:
    """Line, habit and advice. A phrase may run over the end of a line."""
    text = re.sub(r"`[^`\n]*`", "``", prose.text)
    for pattern, instead in PHRASES:
        spread = rf"\b(?:{pattern})\b".replace(" ", r"\s+") if "(?<!" not in pattern else pattern
        for found in re.finditer(spread, text, re.IGNORECASE):
            yield prose.line + text.count("\n", 0, found.start()), found[0], instead
    if not prose.has_start:
        return
    start = text.lstrip("\n ")
    sentence = re.split(r"(?<=[.?!])\s", start)[0]
    for pattern, instead in STARTS:
        if re.match(pattern, start) and not sentence.endswith("?") and not is_clause(sentence):
            yield prose.line, " ".join(sentence.split()[:4]), instead


def is_clause(sentence: str) -> bool:
    """True for "Where X is missing, Y happens": the clause modifies a sentence of its own."""
    return re.match(r"(Where|Whether)\b", sentence) is not None and ", " in sentence


def check(paths: list[Path]) -> list[Finding]:
    findings = []
    for path in paths:
        for prose in prose_of(path):
            for line, habit, instead in habits_in(prose):
                findings.append(Finding(path, line, " ".join(habit.split()), instead))
    return sorted(findings)


def tracked_files(names: list[str]) -> list[Path]:
    command = ["git", "ls-files", "-z", "--", *names]
    listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    paths = [Path(name) for name in listed.split("\0") if name]
    return [path for path in paths if is_scanned(path) and path.is_file()]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("paths", nargs="*", help="files or folders; all tracked files by default")
    findings = check(tracked_files(parser.parse_args().paths))
    for path, line, habit, instead in findings:
        print(f"{path}:{line}: {habit!r} -> {instead}")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
