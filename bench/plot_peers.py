"""Plots the results of bench/peers.py: milliseconds per frame against the roofline.

python bench/plot_peers.py peers.json peers.png      (in the peers' environment)
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.transforms import blended_transform_factory

PRECISIONS = ("float32", "bfloat16", "int8", "int4")
PROGRAMS = ("voxkern", "llama.cpp", "torch.compile", "transformers")
GGUF = {"bfloat16": "BF16", "int8": "Q8_0", "int4": "Q4_0"}
FRAME_MS = 80
OURS, OTHERS, FLOOR, TEXT, REAL_TIME = "#0b6e4f", "#5f6b76", "#d5dbe0", "#333333", "#b3261e"
GAP = 0.7  # rows between two precisions
ROW_INCHES = 0.3
COLUMNS = {"ms": 1.08, "of roofline": 1.24, "x voxkern": 1.4}
"""Columns to the right of the axes; right edges as fractions of the axes' width."""


def draw(results: dict, picture: Path) -> None:
    rows = sorted(
        results["peers"],
        key=lambda row: (PRECISIONS.index(row["precision"]), PROGRAMS.index(row["program"])),
    )
    positions, y = [], 0.0
    for previous, row in zip([None, *rows], rows, strict=False):
        y += GAP if previous and previous["precision"] != row["precision"] else 0
        positions.append(y)
        y += 1
    figure, axes = plt.subplots(figsize=(9.5, 1.7 + ROW_INCHES * y))
    figure.subplots_adjust(left=0.22, right=0.75, top=1 - 0.75 / figure.get_figheight())
    figure.subplots_adjust(bottom=0.8 / figure.get_figheight())
    side_transform = blended_transform_factory(axes.transAxes, axes.transData)
    for row, y in zip(rows, positions, strict=True):
        ours = row["program"] == "voxkern"
        colour, weight = (OURS, "bold") if ours else (OTHERS, "normal")
        if row["floor ms"]:
            low, high = row["past L3 ms"], row["floor ms"]
            axes.barh(y, high - low, 0.8, low, color=FLOOR, zorder=1)
            axes.plot((high, high), (y - 0.4, y + 0.4), color="black", linewidth=1.4, zorder=2)
        spread = [[row["ms"] - row["ms least"]], [row["ms most"] - row["ms"]]]
        axes.errorbar(
            row["ms"], y, xerr=spread, fmt="o", color=colour, capsize=3, markersize=6, zorder=3
        )
        name = row["program"]
        if name == "llama.cpp":
            name += f" {GGUF[row['precision']]}"
        share, ratio = row["% roofline"], row["x voxkern"]
        cells = (
            f"{row['ms']:.0f}",
            f"{share:.0f} %" if share else "",
            f"{ratio:.2f}" if ratio and not ours else "",
        )
        style = {"transform": side_transform, "va": "center", "ha": "right", "fontsize": 9.5}
        axes.text(-0.02, y, name, color=colour, weight=weight, **style)
        for x, cell in zip(COLUMNS.values(), cells, strict=True):
            axes.text(x, y, cell, color=colour, weight=weight, **style)
    top = positions[0] - 0.95
    for title, x in COLUMNS.items():
        axes.text(x, top, title, transform=side_transform, color=TEXT, fontsize=8.5, ha="right")
    for precision in {row["precision"] for row in rows}:
        mine = [y for row, y in zip(rows, positions, strict=True) if row["precision"] == precision]
        middle = sum(mine) / len(mine)
        style = {"transform": side_transform, "va": "center", "fontsize": 11, "color": TEXT}
        axes.text(-0.39, middle, precision, weight="bold", **style)
    axes.set_ylim(positions[-1] + 0.7, positions[0] - 0.7)
    axes.set_yticks([])
    _scale(axes, rows)
    machine = results["machine"]
    where = f"batch 1, {machine['threads']} threads of {machine['processor']}"
    axes.set_title(f"One frame of CSM-1B's transformers, {where}", loc="left", x=-0.39, pad=24)
    _legend(figure)
    figure.savefig(picture, dpi=150)


def _scale(axes, rows: list[dict]) -> None:
    axes.axvline(FRAME_MS, color=REAL_TIME, linestyle=(0, (4, 3)), linewidth=1, zorder=0)
    axes.set_xscale("log")
    ends = [row[key] for row in rows for key in ("past L3 ms", "ms least", "ms most") if row[key]]
    axes.set_xlim(min(*ends, FRAME_MS) * 0.85, max(ends) * 1.15)
    low, high = axes.get_xlim()
    ticks = [t for t in (20, 40, 80, 160, 320, 640, 1280, 2560, 5120) if low <= t <= high]
    axes.set_xticks(ticks, [f"{t}" for t in ticks])
    axes.set_xticks([], minor=True)
    axes.grid(axis="x", color="#e6e6e6", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(axis="x", colors=TEXT, length=0)
    for side in ("top", "left", "right"):
        axes.spines[side].set_visible(False)
    axes.set_xlabel(
        "ms per frame: median, minimum and maximum of the rounds", color=TEXT, fontsize=9
    )


def _legend(figure) -> None:
    handles = [
        Line2D([], [], color=REAL_TIME, linestyle=(0, (4, 3)), label=f"real time: {FRAME_MS} ms"),
        Line2D([], [], color="black", marker="|", linestyle="", markersize=11, markeredgewidth=1.4),
        Patch(color=FLOOR),
    ]
    handles[1].set_label("roofline: every weight read from memory")
    handles[2].set_label("minus what L3 could keep")
    figure.legend(
        handles=handles, frameon=False, fontsize=8.5, ncols=3, loc="lower left", labelcolor=TEXT
    )


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
