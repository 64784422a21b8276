"""Draws when each request gets its frames: a schedule as an SVG."""

from dataclasses import dataclass, field

from vox_serve.policy import Row, Step

WIDTH, LANE, LEFT, TOP = 960, 24, 110, 40
FRAME, PROMPT, WAITS, INK, GRID = "#0b6e4f", "#d98324", "#d5dbe0", "#333333", "#e6e6e6"


@dataclass(frozen=True)
class _Box:
    id: str
    start_s: float
    end_s: float
    is_prompt: bool


@dataclass
class Watched:
    """The steps of a simulation, which calls this at the begin of each."""

    boxes: list[_Box] = field(default_factory=list)
    in_hand: list[tuple[float, str, float]] = field(default_factory=list)
    """Times, rows and seconds of audio that their listeners have in hand."""

    def __call__(self, now_s: float, step: Step, step_s: float, rows: list[Row]) -> None:
        self.boxes += [_Box(row.id, now_s, now_s + step_s, False) for row in step.frames]
        self.boxes += [_Box(row.id, now_s, now_s + step_s, True) for row, _ in step.prompts]
        self.in_hand += [
            (now_s, row.id, max(row.due_s - now_s, 0.0)) for row in rows if row.num_frames
        ]

    def svg(self, start_s: float, end_s: float, arrived_s: float) -> str:
        """The picture of a stretch of time, in which a newcomer arrives."""

        def x(at_s: float) -> float:
            return LEFT + (min(max(at_s, start_s), end_s) - start_s) / (end_s - start_s) * WIDTH

        boxes = [box for box in self.boxes if box.end_s > start_s and box.start_s < end_s]
        ids = sorted({box.id for box in boxes}, key=int)
        height = TOP + LANE * len(ids) + 60
        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {LEFT + WIDTH + 90} {height}" '
            'font-family="sans-serif" font-size="12">',
            f'<rect width="100%" height="{height}" fill="white"/>',
        ]
        bottom = TOP + LANE * len(ids)
        for tenth in range(11):
            at = x(start_s + tenth / 10 * (end_s - start_s))
            parts.append(f'<path d="M{at:.1f} {TOP}V{bottom}" stroke="{GRID}"/>')
            label = f"{tenth / 10 * (end_s - start_s) * 1e3:.0f} ms"
            parts.append(_text(at, bottom + 16, label, "middle"))
        for lane, name in enumerate(ids):
            y = TOP + lane * LANE
            is_last = name == ids[-1]
            parts.append(_text(LEFT - 8, y + 16, "newcomer" if is_last else f"stream {lane + 1}"))
            held = [s for at_s, row, s in self.in_hand if row == name and at_s <= end_s]
            if held:
                parts.append(_text(LEFT + WIDTH + 85, y + 16, f"{held[-1]:.1f} s in hand"))
            for box in boxes:
                if box.id == name:
                    left, width = x(box.start_s), max(x(box.end_s) - x(box.start_s) - 0.6, 0.6)
                    colour = PROMPT if box.is_prompt else FRAME
                    parts.append(
                        f'<rect x="{left:.1f}" y="{y + 4}" width="{width:.1f}" '
                        f'height="{LANE - 8}" fill="{colour}"/>'
                    )
        at = x(arrived_s)
        parts.append(
            f'<path d="M{at:.1f} {TOP - 6}V{bottom}" stroke="{INK}" stroke-dasharray="3"/>'
        )
        parts.append(_text(at, TOP - 12, "the newcomer arrives", "middle"))
        for index, (colour, label) in enumerate(
            ((FRAME, "makes a frame"), (PROMPT, "prompt, and the first frame at its end"))
        ):
            left = LEFT + 160 * index
            parts.append(
                f'<rect x="{left}" y="{bottom + 30}" width="12" height="12" fill="{colour}"/>'
            )
            parts.append(_text(left + 18, bottom + 41, label, "start"))
        return "\n".join([*parts, "</svg>\n"])


def _text(x: float, y: float, text: str, anchor: str = "end") -> str:
    return f'<text x="{x:.1f}" y="{y}" text-anchor="{anchor}" fill="{INK}">{text}</text>'
