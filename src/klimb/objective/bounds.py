"""Settings and the bounds within which they mean what their formula says: outside of them a loss pulls the wrong way,
has no gradient, or is not a number, and nothing of that would be seen in a run before it is over."""

from __future__ import annotations

from dataclasses import dataclass, fields
from types import NoneType
from typing import Annotated, Any, get_args, get_type_hints


@dataclass(frozen=True)
class Bound:
    """NaN is within none."""

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None
    whole: bool = False

    def holds(self, value: float) -> bool:
        return (
            value == value
            and (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.most is None or value <= self.most)
            and (self.below is None or value < self.below)
            and (not self.whole or value % 1 == 0)
        )

    def __str__(self) -> str:
        limits = {"at least": self.least, "above": self.above, "at most": self.most, "below": self.below}
        told = " and ".join(f"{word} {limit:g}" for word, limit in limits.items() if limit is not None)
        return f"a whole number, {told}" if self.whole else told


Positive = Annotated[float, Bound(above=0)]
NotNegative = Annotated[float, Bound(least=0)]
OneOrMore = Annotated[float, Bound(least=1)]
Share = Annotated[float, Bound(least=0, most=1)]
SomeShare = Annotated[float, Bound(above=0, most=1)]
ShareBelowOne = Annotated[float, Bound(least=0, below=1)]
SmallShare = Annotated[float, Bound(above=0, below=0.5)]
ShareBelowHalf = Annotated[float, Bound(least=0, below=0.5)]
Count = Annotated[int, Bound(least=1, whole=True)]


class Bounded:
    """A dataclass whose fields are annotated with bounds: one that lies outside raises ValueError by name."""

    def __post_init__(self) -> None:
        for name, (bound, may_be_none) in bounds_of(type(self)).items():
            value = getattr(self, name)
            if value is None and may_be_none:
                continue
            if value is None or not bound.holds(value):
                told = "none" if value is None else f"{value:g}"
                raise ValueError(f"{type(self).__name__}: {name} = {told}: it has to be {bound}.")


class Ordered(Bounded):
    """One with `low` and `high`, of which `low` is not above `high`: else nothing would lie between them."""

    low: float
    high: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.low <= self.high:
            found = f"low = {self.low:g}, high = {self.high:g}"
            raise ValueError(f"{type(self).__name__}: {found}: nothing lies between; swap them.")


def bounds_of(kind: type) -> dict[str, tuple[Bound, bool]]:
    """By the names of the fields that have one; and whether None is as good."""
    hints = get_type_hints(kind, include_extras=True)
    own = {field.name: hints[field.name] for field in fields(kind)}
    found = {name: (_bound_in(hint), NoneType in get_args(hint)) for name, hint in own.items()}
    return {name: (bound, may_be_none) for name, (bound, may_be_none) in found.items() if bound is not None}


def _bound_in(hint: Any) -> Bound | None:
    """Of Annotated[float, Bound(…)], or of that | None."""
    for part in get_args(hint):
        if isinstance(part, Bound):
            return part
        if (found := _bound_in(part)) is not None:
            return found
    return None
