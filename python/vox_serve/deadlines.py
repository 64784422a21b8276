"""A live request as the policy sees it: what it lacks, and when its next frame is due."""

from dataclasses import dataclass
from math import inf

FRAME_S = 0.08

WHOLE_FRAME_S = 0.4
"""A frame of a whole answer is due so long after the one before it. Admission counts on it."""


@dataclass(slots=True, eq=False)
class Row:
    """A live request. Times are seconds of the caller's clock.

    Attributes:
        id: the request's.
        moved_s: when the request came, or last got a frame or a part of its prompt.
        streams: somebody listens while it is spoken.
        urgent: its client speaks nothing else.
        num_missing: positions of its prompt that are not in the cache.
        num_frames: frames made.
        frames_expected: expected length of its speech; infinite if unknown.
        due_s: when its next frame is due: when the listener has played the frames before it. A
            stream has no such time before its first frame.
        frame_s: time in which the listener plays a frame: shorter for faster speech.
    """

    id: str
    moved_s: float
    streams: bool = True
    urgent: bool = True
    num_missing: int = 0
    num_frames: int = 0
    frames_expected: float = inf
    due_s: float = inf
    frame_s: float = FRAME_S

    def __post_init__(self) -> None:
        if not self.streams and self.due_s == inf:
            self.due_s = self.moved_s + WHOLE_FRAME_S

    @property
    def is_new(self) -> bool:
        """True if somebody waits for its first frame."""
        return self.streams and not self.num_frames

    def prefilled(self, num_tokens: int, now_s: float) -> None:
        """Count prompt tokens that are in the cache now."""
        self.num_missing -= num_tokens
        self.moved_s = now_s

    def made_frame(self, now_s: float) -> None:
        """Count a frame that goes to the listener now."""
        self.num_frames += 1
        self.moved_s = now_s
        if not self.streams:
            self.due_s = now_s + WHOLE_FRAME_S
        elif self.num_frames == 1 or self.due_s < now_s:  # playback begins, or begins again
            self.due_s = now_s + self.frame_s
        else:
            self.due_s += self.frame_s
