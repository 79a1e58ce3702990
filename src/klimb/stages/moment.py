"""The end of a step, as a checkpoint holds it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from torch import Tensor

from klimb.errors import Interrupted, RewardError
from klimb.runtime import checkpoint
from klimb.runtime.learner import Learner
from klimb.runtime.ranks import rank
from klimb.runtime.run import Run

Learners = Mapping[str, Learner]


@dataclass(frozen=True)
class Moment:
    """All that a checkpoint of step `step` of `total` holds beside the learners' weights."""

    step: int
    total: int
    learnt: dict[str, int]
    """Steps of each learner."""
    state: dict[str, Any]
    tensors: dict[str, Tensor]
    reference: dict[str, Tensor]

    @staticmethod
    def of(
        step: int, total: int, learners: Learners, state: Mapping[str, Any], tensors: Mapping[str, Tensor],
        reference: Mapping[str, Tensor],
    ) -> Moment:  # fmt: skip
        """Its mappings are copies: the next step changes the others."""
        apart = {key: dict(value) if isinstance(value, Mapping) else value for key, value in state.items()}
        return Moment(step, total, _steps(learners), apart, dict(tensors), dict(reference))

    def save(self, run: Run, learners: Learners) -> None:
        """While the learners are still where they were."""
        if rank() != 0:
            return
        run.sync()
        named: dict[str, Mapping[str, Tensor]] = {name: learner.tensors() for name, learner in learners.items()}
        kept = {"reference": self.reference} if self.reference else {}
        saved = {"learners": self.learnt, "stage": self.state}
        checkpoint.save(run.checkpoints, self.step, {**named, **kept, "state": self.tensors}, saved)

    def told(self, run: Run) -> str:
        return f"saved after step {self.step} of {self.total} in {run.path}; the same command continues"

    def rescue(self, error: RewardError, run: Run, learners: Learners, *, leaving: bool) -> None:
        """Save before `error` ends the run, and say so: raises it anew, or Interrupted where somebody wanted to leave.

        Nothing where the learners have learnt since: their weights are those of half a step.
        """
        if self.learnt != _steps(learners):
            return
        self.save(run, learners)
        if leaving:
            raise Interrupted(self.told(run)) from error
        raise RewardError(f"{error}; {self.told(run)}") from error


def leave(unsaved: Moment | None, run: Run, learners: Learners) -> NoReturn:
    """Of a stage that samples outside its steps, with what its last step left unsaved. Raises Interrupted."""
    if unsaved is not None and unsaved.learnt == _steps(learners):
        unsaved.save(run, learners)
    raise Interrupted(f"{run.path}: the samples in progress are not kept; the same command draws them anew")


def _steps(learners: Learners) -> dict[str, int]:
    return {name: learner.steps for name, learner in learners.items()}
