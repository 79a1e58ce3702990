"""Names beside points, kept off marks and other names, and off lines where that can be had."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from markupsafe import Markup

from klimb.report.charts import Frame, tag

LETTER = 7.8
"""Width of a bold 13 px letter, generously."""
AROUND = (
    (11, 4, "start"),
    (0, 22, "mid"),
    (0, -13, "mid"),
    (9, 19, "start"),
    (9, -10, "start"),
    (3, 22, "end"),
    (3, -13, "end"),
    (-11, 4, "end"),
)
"""Offsets and anchors that are tried, the best to read first."""


class Box(NamedTuple):
    left: float
    top: float
    right: float
    bottom: float

    def hits(self, other: Box) -> bool:
        across = self.left < other.right and other.left < self.right
        return across and self.top < other.bottom and other.top < self.bottom


def around(x: float, y: float, reach: float) -> Box:
    return Box(x - reach, y - reach, x + reach, y + reach)


@dataclass(frozen=True)
class Label:
    x: float
    y: float
    text: str
    colour: int


@dataclass
class Space:
    """What labels keep off: a `taken` box always, a `crossed` line where that can be had."""

    frame: Frame
    taken: list[Box] = field(default_factory=list)
    crossed: list[Box] = field(default_factory=list)
    labels: list[Label] = field(default_factory=list)

    def free(self, box: Box) -> bool:
        return not any(box.hits(other) for other in self.taken)

    def drawn(self) -> list[Markup]:
        """The labels, each at its best place; one without any is left out, for the legend names it too."""
        return [text for label in self.labels if (text := self._placed(label)) is not None]

    def _placed(self, label: Label) -> Markup | None:
        places = [place for place in _places(label) if self._inside(place[0]) and self.free(place[0])]
        if not places:
            return None
        # min() keeps the first of equals, and the places come best first.
        box, x, y, anchor = min(places, key=lambda place: sum(place[0].hits(line) for line in self.crossed))
        self.taken.append(box)
        return tag("text", label.text, x=x, y=y, class_=f"label halo {anchor}")

    def _inside(self, box: Box) -> bool:
        frame, margin = self.frame, 14
        across = box.left >= frame.left and box.right <= frame.left + frame.width + margin
        return across and box.top >= frame.top and box.bottom <= frame.top + frame.height


def _places(label: Label) -> Iterator[tuple[Box, float, float, str]]:
    wide = LETTER * len(label.text)
    for dx, dy, anchor in AROUND:
        x, y = label.x + dx, label.y + dy
        left = {"start": x, "mid": x - wide / 2, "end": x - wide}[anchor]
        yield Box(left, y - 11, left + wide, y + 4), x, y, anchor


def line_boxes(frame: Frame, lines: Sequence[Sequence[tuple[float, float]]]) -> list[Box]:
    """Where lines in data coordinates run, as small boxes at their points."""
    return [around(frame.px(x), frame.py(y), 2) for line in lines for x, y in line]
