"""Find constants of one name with two values in the CUDA sources.

    python tools/constant_check.py [FILE ...]

A reader who knows `kRows` from one file should not meet another `kRows` in the next. Checks all of
csrc/cuda by default, prints each such name with its values and places, and exits with 1 if there is
one. A constant that passes on a template's parameter (`kM = kM_`) or argument (`kM = Tile::kM`) has
no value of its own; one that an #if defines and its #else defines again has the first.
"""

import re
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[1]
# One declaration may define several: constexpr int kA = 1, kB = 2;
DECLARATION = re.compile(r"\bconstexpr\b[^;(]*?\b(k[A-Z]\w*(?:\[\])? = [^;]*);")
ELSE = re.compile(r"^#else\n(?:[^#].*\n|\n)*#endif", re.MULTILINE)
CONSTANT = re.compile(r"\b(k[A-Z]\w*)(?:\[\])? = ((?:\([^)]*\)|<[^>]*>|\{[^}]*\}|[^,(<{]|<)+)")


def find_doubles(files: list[Path]) -> dict[str, dict[str, list[str]]]:
    """The names with more than one value: each value with the places that define it."""
    values: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for file in files:
        text = ELSE.sub(lambda match: "\n" * match[0].count("\n"), file.read_text())
        text = re.sub(r"//[^\n]*", "", text)
        for declaration in DECLARATION.finditer(text):
            line = text.count("\n", 0, declaration.start(1)) + 1
            for name, value in CONSTANT.findall(declaration[1]):
                if not re.fullmatch(rf"{name}_|[\w<>:]+::{name}", value.strip()):
                    values[name][" ".join(value.split())].append(f"{file}:{line}")
    return {name: found for name, found in values.items() if len(found) > 1}


def main() -> int:
    files = [Path(f) for f in sys.argv[1:]] or sorted((ROOT / "csrc" / "cuda").rglob("*.cu*"))
    doubles = find_doubles(files)
    for name, found in sorted(doubles.items()):
        for value, places in found.items():
            print(f"{name} = {value}: {', '.join(places)}")
    return int(bool(doubles))


if __name__ == "__main__":
    sys.exit(main())
