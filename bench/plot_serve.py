"""Plots the results of bench/bench_serve.py: what listeners get at each load.

python bench/plot_serve.py serve.json serve.png      (needs matplotlib)
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLOURS = ("#5f6b76", "#0b6e4f", "#b3261e", "#3a5a98")
CASES = ("poisson", "burst")
PANELS = {
    "first audio, ms": ("first p50", "first p95", "first p99"),
    "streams with gaps, %": ("with gaps",),
    "goodput, seconds of audio a second": ("goodput x",),
    "refused, %": ("refused",),
}
STYLES = {"first p50": ":", "first p95": "-", "first p99": "--"}


def draw(results: dict, picture: Path) -> Path:
    """Draw each case that has loads as a row of panels; the picture's path."""
    tables = {case: results.get(f"{case}: medians") or results.get(case) for case in CASES}
    tables = {case: rows for case, rows in tables.items() if rows}
    if not tables:
        raise ValueError("no case with loads: nothing to plot")
    figure, grid = plt.subplots(
        len(tables), len(PANELS), figsize=(15, 3.4 * len(tables)), squeeze=False
    )
    for axes, (case, rows) in zip(grid, tables.items(), strict=True):
        for panel, (title, columns) in zip(axes, PANELS.items(), strict=True):
            _draw_panel(panel, rows, title, [c for c in columns if c in rows[0]])
        axes[0].set_title(case, loc="left", fontsize=10, weight="bold")
    grid[0][0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(picture, dpi=120)
    return picture


def _draw_panel(axes, rows: list[dict], title: str, columns: list[str]) -> None:
    servers = list(dict.fromkeys(row["server"] for row in rows))
    for server, colour in zip(servers, COLOURS * len(servers), strict=False):
        mine = [row for row in rows if row["server"] == server]
        for column in columns:
            scale = [100 / row["streams"] if title.endswith("%") else 1 for row in mine]
            values = [
                None if row[column] is None else row[column] * by
                for row, by in zip(mine, scale, strict=True)
            ]
            name = f"{server} {column.removeprefix('first ')}" if len(columns) > 1 else server
            axes.plot(
                [row["load"] for row in mine],
                [float("nan") if value is None else value for value in values],
                STYLES.get(column, "-"),
                marker="o",
                markersize=3,
                color=colour,
                label=name,
            )
    if title.startswith("first"):
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.set_xlabel("offered load, 1 = capacity", fontsize=8)
    axes.set_ylabel(title, fontsize=8)
    axes.grid(alpha=0.3)
    axes.tick_params(labelsize=8)


if __name__ == "__main__":
    print(draw(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])))
