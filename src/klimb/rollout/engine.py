"""What an engine that generates completions offers, and how the training loop takes whole groups from it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from klimb.rollout.sampling import SamplingParams
from klimb.types import Group, Prompt, Sample


@dataclass(frozen=True)
class Request:
    """`samples` completions of one prompt, numbered from `first`."""

    prompt: Prompt
    samples: int
    params: SamplingParams
    seed: int
    first: int = 0


class RolloutEngine(Protocol):
    """submit → stream → update_weights: completions come in any order, from any mix of versions, some aborted.

    `stream` yields finished samples until nothing is outstanding or the engine is paused; weights may be updated
    between two of them, every token says by its version which weights sampled it.
    """

    def submit(self, requests: Sequence[Request]) -> None: ...

    def stream(self) -> Iterator[tuple[Request, Sample]]: ...

    def update_weights(self, version: int) -> None: ...

    def pause(self) -> None: ...

    def resume(self) -> None: ...

    def abort(self) -> None: ...


def finished_groups(stream: Iterable[tuple[Request, Sample]]) -> Iterator[tuple[Request, Group]]:
    """Groups as they become complete. Aborted samples count as delivered and are left out of their group."""
    waiting: dict[int, list[Sample]] = {}
    for request, sample in stream:
        arrived = waiting.setdefault(id(request), [])
        arrived.append(sample)
        if len(arrived) == request.samples:
            samples = [s for s in waiting.pop(id(request)) if s.finish != "abort"]
            yield request, Group(request.prompt, sorted(samples, key=lambda s: s.index))


def generate(engine: RolloutEngine, requests: Sequence[Request]) -> list[Group]:
    """All groups of these requests, in their order whatever order they finished in."""
    engine.submit(requests)
    finished = {id(request): group for request, group in finished_groups(engine.stream())}
    return [finished[id(request)] for request in requests]
