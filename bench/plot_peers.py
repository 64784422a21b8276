"""Draws what bench/peers.py measured: milliseconds per frame, against the roofline.

python bench/plot_peers.py peers.json peers.png      (in the peers' environment)
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PRECISIONS = {
    "float32": "float32",
    "bfloat16": "bfloat16",
    "int8": "int8\n(llama.cpp: Q8_0)",
    "int4": "int4\n(llama.cpp: Q4_0)",
}
# Colours that differ in lightness too.
COLOURS = {
    "voxkern": "#0b6e4f",
    "llama.cpp": "#e08e0b",
    "torch.compile": "#7a9ccf",
    "transformers": "#2f4b8f",
}
FRAME_MS = 80
SLOT = 0.8  # of the distance between precisions: what their bars share


def draw(results: dict, picture: Path) -> None:
    rows = results["peers"]
    precisions = [p for p in PRECISIONS if any(row["precision"] == p for row in rows)]
    figure, axes = plt.subplots(figsize=(8.5, 4.8), layout="constrained")
    for place, precision in enumerate(precisions):
        here = [row for row in rows if row["precision"] == precision]
        here.sort(key=lambda row: list(COLOURS).index(row["program"]))
        width = SLOT / max(len(here), 2)
        for i, row in enumerate(here):
            x = place + (i - (len(here) - 1) / 2) * width
            spread = [[row["ms"] - row["ms least"]], [row["ms most"] - row["ms"]]]
            colour = COLOURS[row["program"]]
            axes.errorbar(x, row["ms"], spread, fmt="o", color=colour, capsize=4, markersize=7)
            text = {"textcoords": "offset points", "fontsize": 9, "va": "center"}
            axes.annotate(f"{row['ms']:.0f}", (x, row["ms"]), (7, 0), **text)
        floor = min(row["floor ms"] for row in here)
        axes.hlines(floor, place - SLOT / 2, place + SLOT / 2, color="black", linewidth=1.5)
    axes.axhline(FRAME_MS, color="#b3261e", linestyle="--", linewidth=1)
    axes.annotate(
        f"real time, {FRAME_MS} ms",
        (0.005, FRAME_MS),
        (0, 3),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        color="#b3261e",
        fontsize=9,
    )
    axes.set_yscale("log")
    ticks = [20, 50, 80, 100, 200, 500, 1000, 2000, 5000]
    low, high = axes.get_ylim()
    axes.set_yticks([t for t in ticks if low <= t <= high], minor=False)
    axes.yaxis.set_major_formatter("{x:.0f}")
    axes.yaxis.set_minor_formatter("")
    axes.set_xticks(range(len(precisions)), [PRECISIONS[p] for p in precisions])
    axes.set_xlim(-0.5, len(precisions) - 0.5)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_ylabel("ms per frame (least, median, most of the rounds)")
    machine = results["machine"]
    axes.set_title(
        f"One frame of CSM-1B's transformers, batch 1, {machine['threads']} threads", loc="left"
    )
    handles = [
        plt.Line2D([], [], marker="o", linestyle="", color=colour, label=program)
        for program, colour in COLOURS.items()
        if any(row["program"] == program for row in rows)
    ]
    handles.append(plt.Line2D([], [], color="black", label="roofline: weights / read bandwidth"))
    axes.legend(handles=handles, frameon=False, fontsize=9)
    figure.savefig(picture, dpi=150)


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
