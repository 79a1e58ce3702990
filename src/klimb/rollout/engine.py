"""What an engine that generates completions offers, and how the training loop takes whole groups from it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from klimb.rollout.sampling import SamplingParams
from klimb.runtime.ranks import gather, rank, world
from klimb.types import Group, Prompt, Sample, Segment


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


def generate(
    engine: RolloutEngine, requests: Sequence[Request], on_group: Callable[[Group], None] = lambda group: None
) -> list[Group]:
    """All groups of these requests, in their order whatever order they finished in.

    Ranks share the work, request by request; each gets all groups. on_group: told of each group when it is complete,
    where one rank has them all.
    """
    mine = requests[rank() :: world()]
    engine.submit(mine)
    finished: dict[int, Group] = {}
    for request, group in finished_groups(engine.stream()):
        finished[id(request)] = group
        if world() == 1:
            on_group(group)
    if world() == 1:
        return [finished[id(request)] for request in mine]
    everyone = gather([[asdict(sample) for sample in finished[id(request)].samples] for request in mine])
    plain = [everyone[i % world()][i // world()] for i in range(len(requests))]
    return [Group(request.prompt, [_sample(s) for s in samples]) for request, samples in zip(requests, plain)]


def _sample(plain: dict[str, Any]) -> Sample:
    return Sample(**{**plain, "segments": [Segment(**segment) for segment in plain["segments"]]})
