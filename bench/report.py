"""Results as tables for people, and as a last line of JSON for programs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import machine


class Table:
    """Rows under named columns; numbers are shown with three significant digits, None as a dash."""

    WIDTHS: ClassVar = {"what": 24, "op": 17, "shape": 34, "program": 13, "packing": 19}

    def __init__(self, name: str, columns: list[str], added: Callable[[], None]):
        self.name = name
        self.added = added
        self.columns = columns
        self.rows: list[tuple] = []

    def add(self, *values) -> None:
        """Adds a row and prints it at once, so that a long benchmark can be followed."""
        assert len(values) == len(self.columns)
        if not self.rows:
            print(f"\n{self.name}")
            self._show(self.columns)
        self.rows.append(values)
        self._show([_cell(v) for v in values])
        self.added()

    def _show(self, cells: list[str]) -> None:
        widths = (max(self.WIDTHS.get(c, 9), len(c)) for c in self.columns)
        print("  ".join(f"{c:>{w}}" for c, w in zip(cells, widths, strict=True)), flush=True)


def _cell(value: str | float | None) -> str:
    if value is None:
        return "-"
    return value if isinstance(value, str) else f"{value:.3g}"


class Report:
    """All tables of one run and the machine that they were measured on."""

    def __init__(self):
        self.machine = machine.describe()
        self.tables: list[Table] = []
        self.left_out: list[str] = []
        self.path: Path | None = None
        """Rewritten after every row, so that an interrupted run keeps its results."""

    def leave_out(self, what: str, why: object) -> None:
        """Prints and records that something was not measured, and the reason."""
        line = f"{what}: {str(why).splitlines()[0] if str(why) else repr(why)}"
        if line not in self.left_out:
            self.left_out.append(line)
            print(f"left out: {line}", flush=True)

    def table(self, name: str, columns: list[str]) -> Table:
        self.tables.append(Table(name, columns, self.save))
        return self.tables[-1]

    def save(self) -> None:
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            whole = self.path.with_suffix(".new")
            whole.write_text(self.json(indent=1) + "\n")
            whole.replace(self.path)

    def json(self, indent: int | None = None) -> str:
        rows = {
            t.name: [dict(zip(t.columns, row, strict=True)) for row in t.rows] for t in self.tables
        }
        if self.left_out:
            rows["left out"] = self.left_out
        return json.dumps({"machine": self.machine, **rows}, indent=indent)
