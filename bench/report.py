"""Tables for people, one last line of JSON for programs."""

import json
import platform

import torch

import voxkern


class Table:
    """Rows under named columns; numbers are shown with three significant digits."""

    def __init__(self, name: str, columns: list[str]):
        self.name = name
        self.columns = columns
        self.rows: list[tuple] = []

    def add(self, *values) -> None:
        """One row, shown at once: a long benchmark is read as it runs."""
        assert len(values) == len(self.columns)
        if not self.rows:
            print(f"\n{self.name}")
            print("  ".join(f"{c:>{self._width(i)}}" for i, c in enumerate(self.columns)))
        self.rows.append(values)
        cells = (v if isinstance(v, str) else f"{v:.3g}" for v in values)
        print("  ".join(f"{c:>{self._width(i)}}" for i, c in enumerate(cells)), flush=True)

    def _width(self, column: int) -> int:
        return max(28 if column == 0 else 11, len(self.columns[column]))


class Report:
    """All tables of one run, and the machine that they were measured on."""

    def __init__(self):
        self.machine = {
            "processor": platform.processor() or platform.machine(),
            "threads": voxkern.num_threads(),
            "isa": torch.ops.voxkern.cpu_isa(),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        }
        self.tables: list[Table] = []

    def table(self, name: str, columns: list[str]) -> Table:
        self.tables.append(Table(name, columns))
        return self.tables[-1]

    def json(self) -> str:
        rows = {
            t.name: [dict(zip(t.columns, row, strict=True)) for row in t.rows] for t in self.tables
        }
        return json.dumps({"machine": self.machine, **rows})
