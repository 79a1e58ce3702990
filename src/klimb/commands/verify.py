"""`klimb verify my_file.py:MINE`: what every row of the tables fulfils, tried on a row or a loss of one's own.

On made-up updates in float64: samples of different lengths (one of them without a token), policies some way apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from klimb.batch import BatchTotals
from klimb.commands.algorithms import method
from klimb.objective.algorithm import Algorithm
from klimb.objective.credit import assign_credit
from klimb.objective.policy_loss import policy_loss, update_columns
from klimb.objective.preference import Completions, Pairs, PreferenceLoss, known_start, needs_of, statistics_of
from klimb.objective.refusals import problems
from klimb.objective.surrogate import reinforce

LENGTHS = torch.tensor([5, 1, 3, 0, 4, 2, 5, 3])
MASK = torch.arange(5)[None, :] < LENGTHS[:, None]
GROUP = torch.arange(8) // 4
PARTS = ([0, 1, 2], [3], [4, 6], [5, 7])
ROUNDING = 1e-10
"""Relative, in float64: what P5 of the design promises of any split."""
DIFFERENCE = 1e-6
"""Relative: a central difference of step 1e-5 errs by about its square, and by rounding of 1e-16/1e-5."""


class Finding(NamedTuple):
    """ok None: the property is not asked of this method, `text` says why."""

    property: str
    ok: bool | None
    text: str = ""


class Method(NamedTuple):
    """What both kinds are tried as: a loss of log-probs, over all of an update or a part of it."""

    loss: Callable[[Tensor, Sequence[int]], Tensor]
    logps: Tensor
    mask: Tensor
    parts: Sequence[Sequence[int]]
    everything: Sequence[int]


def verify(name: str) -> list[Finding]:
    """Of an algorithm or a preference loss, by its name or as ``file.py:NAME``. Raises ValueError: there is none."""
    value = method(name)
    found = _of_row(value) if isinstance(value, Algorithm) else _of_loss(value)
    findings = []
    for wanted, test in found.items():
        try:
            text = test()
            findings.append(Finding(wanted, True) if text is None else Finding(wanted, *_verdict(text)))
        except Exception as error:  # whatever a person's own function raises is a finding
            findings.append(Finding(wanted, False, f"{type(error).__name__}: {' '.join(str(error).split())}"))
    return findings


class NotAsked(str):
    """Why a property is not asked of a method."""


def _verdict(text: str) -> tuple[bool | None, str]:
    return (None if isinstance(text, NotAsked) else False), text


Tests = Mapping[str, Callable[[], str | None]]
"""Property → its test, which says what is wrong, or nothing."""


# Rows of the table ---------------------------------------------------------------------------------------------------


def _of_row(row: Algorithm) -> Tests:
    row = row.resolve(max_length=MASK.shape[1])
    far = _update()
    return {
        "the combination makes sense": lambda: (
            "; ".join(problems(row, samples_per_prompt=4, updates_per_step=1)) or None
        ),
        "at ratio 1 the gradient is REINFORCE's": lambda: _starts_as_reinforce(row),
        "equal scores in a group teach nothing": lambda: _zero_variance(row),
        **_common(lambda hole: _row_method(row, _update(hole))),
        "far from the old policy it stays finite": lambda: _finite(
            _row_method(row, far | {"logps": torch.where(MASK, 1e4 * torch.sign(far["values"] - far["logps"]), 0.0)})
        ),
        "an update without a token is zero": lambda: _without_tokens(row),
    }


def _update(hole: float = 0.0) -> dict[str, Tensor]:
    """Policies about 0.2 apart, so that many tokens are beyond a clip; `hole` stands where there is no token."""
    draw = torch.Generator().manual_seed(0)
    base = -torch.rand(MASK.shape, generator=draw, dtype=torch.float64) - 0.5
    names = ("logps", "old_logps", "behavior_logps", "ref_logps", "entropy", "values")
    tokens = {name: base + 0.2 * torch.randn(MASK.shape, generator=draw, dtype=torch.float64) for name in names}
    tokens = {name: torch.where(MASK, column, hole) for name, column in tokens.items()}
    return tokens | {"scores": torch.randn(len(MASK), generator=draw, dtype=torch.float64)}


def _advantages(row: Algorithm, given: Mapping[str, Tensor], mask: Tensor = MASK) -> Tensor:
    scores = given["scores"]
    return assign_credit(
        row, scores=scores, mask=mask, group=GROUP, logps=given["behavior_logps"], ref_logps=given["ref_logps"],
        values=given["values"], parts=torch.stack([scores, -2 * scores], dim=1),
        part_weights=torch.tensor([1.0, 3.0]), baseline=torch.zeros(len(mask), dtype=torch.float64),
        collisions=0.5 * given["behavior_logps"].exp(),
    ).advantages  # fmt: skip


def _row_method(row: Algorithm, given: Mapping[str, Tensor], mask: Tensor = MASK) -> Method:
    advantages, totals = _advantages(row, given, mask), BatchTotals.of(mask, GROUP)
    stored: dict[str, Any] = {name: given[name] for name in ("old_logps", "behavior_logps", "entropy")}
    columns = update_columns(
        row, logps=given["logps"], advantages=advantages, scores=given["scores"], mask=mask, **stored
    )
    columns |= stored | {"ref_logps": given["ref_logps"], "advantages": advantages, "mask": mask}

    def loss(logps: Tensor, part: Sequence[int]) -> Tensor:
        own: dict[str, Any] = {name: column[part] for name, column in columns.items()}
        return policy_loss(row, logps=logps[part], totals=totals, **own)[0]

    return Method(loss, given["logps"], mask, PARTS, range(len(mask)))


def _starts_as_reinforce(row: Algorithm) -> str | None:
    given = _update()
    given |= {"old_logps": given["logps"], "behavior_logps": given["logps"]}
    found, wanted = (
        _gradient(_row_method(each, given))[1] for each in (row, replace(row, surrogate=reinforce, importance=None))
    )
    return _apart("gradient", found, wanted, ROUNDING)


def _zero_variance(row: Algorithm) -> str | None:
    """Asked of an advantage that looks at the others of its group, by trial: one score moves, do others' advantages?"""
    given = _update()
    given |= {"ref_logps": given["behavior_logps"]}
    row = replace(row, overlong=None)  # a price on length is a difference
    plain = replace(row, normalise=None)
    moved = given | {"scores": given["scores"] + torch.tensor([1.0] + [0.0] * 7, dtype=torch.float64)}
    change = (_advantages(plain, moved) - _advantages(plain, given)).abs().sum(dim=1)
    if change[1:3].max() <= ROUNDING or change[4:].max() > ROUNDING:
        return NotAsked("its advantage does not compare the samples of a group with each other alone")
    equal = given | {"scores": torch.tensor([0.3, 0.1 + 0.2, 0.3, 9.0, *given["scores"][4:]], dtype=torch.float64)}
    found = _advantages(plain, equal)[:3]
    return None if bool((found == 0).all()) else f"three equal scores gave advantages up to {found.abs().max():.3g}"


def _without_tokens(row: Algorithm) -> str | None:
    nothing = torch.zeros_like(MASK)
    value, gradient = _gradient(_row_method(row, _update(), nothing))
    return None if value == 0 and not gradient.any() else f"loss {value:.3g}, gradient {gradient.norm():.3g}"


# Preference losses ---------------------------------------------------------------------------------------------------


def _of_loss(loss: PreferenceLoss) -> Tests:
    far = _sides()
    return {
        "at π = π_ref it is finite": lambda: _start(loss),
        "a pair in the wrong order is put right": lambda: _puts_right(loss),
        **_common(lambda hole: _loss_method(loss, _sides(hole))),
        "far from the reference it stays finite": lambda: _finite(
            _loss_method(loss, far | {"logps": torch.where(_pair_mask(), 1e4 * torch.sign(far["logps"] + 1), 0.0)})
        ),
    }


def _pair_mask() -> Tensor:
    """Chosen, rejected and gold of 4 pairs; with labels the first 4 are desirable, the others not."""
    lengths = torch.tensor([5, 1, 3, 4, 2, 5, 3, 4, 1, 2, 5, 3])
    return torch.arange(5)[None, :] < lengths[:, None]


def _sides(hole: float = 0.0) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    mask = _pair_mask()
    base = -torch.rand(mask.shape, generator=draw, dtype=torch.float64) - 0.5
    apart = 0.3 * torch.randn(mask.shape, generator=draw, dtype=torch.float64)
    tokens = {"logps": base + apart, "ref_logps": base, "collisions": 1.5 * base}
    return {name: torch.where(mask, column, hole) for name, column in tokens.items()}


def _loss_method(loss: PreferenceLoss, given: Mapping[str, Tensor]) -> Method:
    """Parts are pairs: number i is the samples i, 4 + i and 8 + i."""
    mask, needs = _pair_mask(), needs_of(loss)
    reference = given["ref_logps"] if needs.reference else None
    mismatched = torch.tensor([0.2, -0.1, 0.4], dtype=torch.float64) if needs.mismatched else None

    def pairs(logps: Tensor, part: Sequence[int], fixed: Mapping[str, Tensor]) -> Pairs:
        def side(first: int) -> Completions:
            rows = [first + i for i in part]
            ref, more = (None if c is None else c[rows] for c in (reference, given["collisions"]))
            return Completions(logps[rows], ref, mask[rows], more)

        own = {name: value[part] if value.ndim else value for name, value in fixed.items()}
        return Pairs(side(0), side(4), side(8), mismatched, own)

    def value(logps: Tensor, part: Sequence[int]) -> Tensor:
        with torch.no_grad():
            fixed, _ = statistics_of(loss, pairs(given["logps"], range(4), {}), {})
        return loss(pairs(logps, part, fixed)).sum() / 4

    return Method(value, given["logps"], mask, ([0, 2], [1], [3]), range(4))


def _start(loss: PreferenceLoss) -> str | None:
    start = known_start(loss)
    if start is None:
        return NotAsked("what it is there depends on the data" if needs_of(loss).reference else "it has no reference")
    return None if torch.tensor(start).isfinite() else f"it is {start}"


def _puts_right(loss: PreferenceLoss) -> str | None:
    """Chosen completions below the reference, rejected ones above: the gradient has to bring them together."""
    given = _sides()
    away = torch.where(torch.arange(12) < 4, 2.0, 0.5)[:, None]
    _, gradient = _gradient(_loss_method(loss, given | {"logps": away * given["ref_logps"]}))
    chosen, rejected = gradient[:4].sum(), gradient[4:8].sum()
    return None if chosen < rejected else f"d loss/d log π: chosen {chosen:.3g}, rejected {rejected:.3g}"


# What is asked of both -----------------------------------------------------------------------------------------------


def _common(make: Callable[[float], Method]) -> Tests:
    return {
        "the gradient is that of finite differences": lambda: _finite_differences(make(0.0)),
        "any split gives the same loss and gradient": lambda: _any_split(make(0.0)),
        "what stands where no token is does not matter": lambda: _holes(make(0.0), make(torch.nan)),
    }


def _gradient(method: Method, parts: Sequence[Sequence[int]] | None = None) -> tuple[Tensor, Tensor]:
    logps = method.logps.clone().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for part in parts or [method.everything]:
        value = method.loss(logps, list(part))
        if value.requires_grad:
            value.backward()
        total = total + value.detach()
    return total, torch.zeros_like(logps) if logps.grad is None else logps.grad


def _any_split(method: Method) -> str | None:
    (value, gradient), (other, split) = _gradient(method), _gradient(method, method.parts)
    return _apart("loss", other, value, ROUNDING) or _apart("gradient", split, gradient, ROUNDING)


def _holes(clean: Method, holed: Method) -> str | None:
    (value, gradient), (other, found) = _gradient(clean), _gradient(holed)
    return _apart("loss", other, value, 0.0) or _apart("gradient", found, gradient, 0.0)


def _finite(method: Method) -> str | None:
    value, gradient = _gradient(method)
    fine = value.isfinite() and gradient.isfinite().all()
    return None if fine else f"loss {value:.3g}, gradient {gradient.norm():.3g}"


class Held(TorchFunctionMode):
    """What was detached in the first run stays what it was in the next: as for autograd, so for a difference."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []
        self.again: Iterator[Tensor] | None = None

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is not Tensor.detach:
            return function(*args, **(kwargs or {}))
        if self.again is not None:
            return next(self.again)
        self.seen.append(function(*args))
        return self.seen[-1]


def _finite_differences(method: Method) -> str | None:
    _, gradient = _gradient(method)
    held, step, found = Held(), 1e-5, torch.zeros_like(method.logps)

    def value(logps: Tensor) -> float:
        with held:
            return float(method.loss(logps, list(method.everything)))

    value(method.logps)
    for place in method.mask.nonzero().tolist():
        for sign in (1, -1):
            held.again = iter(held.seen)
            moved = method.logps.clone()
            moved[tuple(place)] += sign * step
            found[tuple(place)] += sign * value(moved) / (2 * step)
    return _apart("gradient", gradient, found, DIFFERENCE)


def _apart(what: str, found: Tensor, wanted: Tensor, tolerance: float) -> str | None:
    """By more than the tolerance, relative to what is wanted."""
    apart = float((found - wanted).norm())
    if apart <= tolerance * max(float(wanted.norm()), 1e-3):
        return None
    return f"{what} is off by {apart:.3g}, of {float(wanted.norm()):.3g}"


@dataclass(frozen=True)
class Report:
    """For the command: the lines, and whether it can be used."""

    name: str
    findings: list[Finding]

    @property
    def passed(self) -> bool:
        return all(finding.ok is not False for finding in self.findings)

    def lines(self) -> Iterator[str]:
        for finding in self.findings:
            mark = {True: "pass", False: "FAIL", None: "–   "}[finding.ok]
            yield f"{mark}  {finding.property}" + (f": {finding.text}" if finding.text else "")
        key = "algorithm" if isinstance(method(self.name), Algorithm) else "loss"
        count = sum(finding.ok is False for finding in self.findings)
        yield f"use it with {key}={self.name}" if self.passed else f"{self.name}: {count} properties do not hold"
