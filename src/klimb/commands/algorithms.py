"""`klimb algorithms`: the tables, and one page for each row, told by the values themselves.

A page is made of a row's fields and of what its parts say: a docstring begins with the formula and its paper, a
sentence that begins with "Fails" names the main failure, one with "Degrades" says when it gets worse or turns into
something else. A value with a `page` (formula, source, failure, degrades) has said it there.
"""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple

from klimb.objective.algorithm import Algorithm
from klimb.objective.algorithms import ALGORITHMS
from klimb.objective.kl import KL
from klimb.objective.preference import PREFERENCE_LOSSES, known_start, needs_of
from klimb.objective.refusals import problems
from klimb.objective.spec import algorithm_row
from klimb.plugin import is_reference, load_attribute, unknown_name

NOT_HERE = (
    "PG-DPO, which some lists have, is not here: no formula of it could be found. Its neighbours are beta_dpo, "
    "dpo_shift and dpop."
)
RULE_OF_THUMB = (
    "Which one? A program can check the answer: grpo.",
    "Preferences, and a small budget: dpo.",
    "Preferences, and a budget to explore with: ppo, or grpo on a reward model.",
)
_WIDTH = 110


class Said(NamedTuple):
    """What a value says about itself; empty where it says nothing."""

    formula: str
    notes: str = ""
    source: str = ""
    fails: str = ""
    degrades: str = ""


def said_by(value: Any) -> Said:
    if (page := getattr(value, "page", None)) is not None:
        told = _sentences(value)
        return Said(page.formula, " ".join(told), page.source, page.failure, page.degrades)
    formula, *others = [*_sentences(value), ""]
    marked = {
        word: " ".join(s.removeprefix(f"{word} ") for s in others if s.startswith(f"{word} "))
        for word in ("Fails", "Degrades")
    }
    notes = " ".join(s for s in others if s and not s.startswith(("Fails ", "Degrades ")))
    return Said(formula, notes, "", marked["Fails"], marked["Degrades"])


def method(name: str) -> Algorithm | Callable[..., Any]:
    """An algorithm or a preference loss by its name or as ``file.py:NAME``. Raises ValueError."""
    if is_reference(name):
        value = load_attribute(name)
    elif name in ALGORITHMS:
        value = ALGORITHMS[name]
    elif name in PREFERENCE_LOSSES:
        value = PREFERENCE_LOSSES[name]
    else:
        raise unknown_name("algorithms: unknown", name, [*ALGORITHMS, *PREFERENCE_LOSSES])
    value = value() if isinstance(value, type) else value
    if not callable(value) and not isinstance(value, Algorithm):
        raise ValueError(
            f"{name} is {type(value).__name__}: neither an Algorithm nor a preference loss; "
            "write NAME = replace(GRPO, ...), or a function of pairs."
        )
    return value


def page(name: str) -> dict[str, Any]:
    """All there is to say of one method. Raises ValueError where the name is unknown."""
    value = method(name)
    return online_page(value) if isinstance(value, Algorithm) else offline_page(name, value)


def online_page(algorithm: Algorithm) -> dict[str, Any]:
    """formula, notes: by axis. defaults: by the key that changes them."""
    parts = {axis: part for axis, part in _axes(algorithm).items() if part}
    said = {axis: _said_on(axis, part, algorithm) for axis, part in parts.items()}
    row = algorithm_row(algorithm)
    return {
        "name": algorithm.name,
        "kind": "online",
        "axes": {axis: text for axis, text in row.items() if axis not in ("name", "source")},
        "formula": {axis: its.formula for axis, its in said.items() if its.formula},
        "notes": {axis: its.notes for axis, its in said.items() if its.notes},
        "defaults": dict(_defaults(parts)),
        "source": algorithm.source,
        "models": _models(_FROZEN if algorithm.needs.ref else "", critic=algorithm.needs.critic),
        "takes": [*_takes(algorithm)],
        "fails": [f"{axis}: {its.fails}" for axis, its in said.items() if its.fails],
        "degrades": [f"{axis}: {its.degrades}" for axis, its in said.items() if its.degrades],
    }


def offline_page(name: str, loss: Any) -> dict[str, Any]:
    said, needs, start = said_by(loss), needs_of(loss), known_start(loss)
    own = {key: getattr(loss, key) for key in _parameters(loss)}
    return {
        "name": name,
        "kind": "offline",
        "formula": said.formula,
        "notes": said.notes,
        "defaults": {key: value for key, value in own.items() if isinstance(value, int | float)},
        "source": said.source,
        "models": _models((_FROZEN if needs.mismatched else _KEPT) if needs.reference else ""),
        "takes": [_DATA[needs.data], *(["a second forward pass over each update"] if _passes(needs, loss) else [])],
        "first_loss": start,
        "fails": [said.fails] if said.fails else [],
        "degrades": [said.degrades] if said.degrades else [],
    }


def pages(offline: bool) -> list[dict[str, Any]]:
    return [page(name) for name in (PREFERENCE_LOSSES if offline else ALGORITHMS)]


def listing(offline: bool) -> list[dict[str, str]]:
    """The table as it is printed: what fits beside each other."""
    if offline:
        return [
            {
                "name": row["name"],
                "formula": row["formula"],
                "takes": row["takes"][0],
                "models": str(len(row["models"])),
            }
            for row in pages(offline=True)
        ]
    shown = ("advantage", "surrogate", "aggregate", "kl")
    rows = []
    for row in pages(offline=False):
        rest = [text for axis, text in row["axes"].items() if axis not in shown and text not in ("none", "0")]
        rows.append({"name": row["name"], **{axis: row["axes"][axis] for axis in shown}, "besides": ", ".join(rest)})
    return rows


def text_of(row: Mapping[str, Any]) -> str:
    """A page for a terminal."""
    lines = [f"{row['name']}: {row['source']}" if row["source"] else row["name"]]
    if row["kind"] == "online":
        for axis, text in row["axes"].items():
            if axis in row["formula"]:
                lines += ["", f"{axis}  {text}"]
                lines += [_indented(part[axis]) for part in (row["formula"], row["notes"]) if axis in part]
    else:
        lines += ["", *(_indented(row[key]) for key in ("formula", "notes") if row[key])]
        if row["first_loss"] is not None:
            lines.append(_indented(f"While π = π_ref the loss is {row['first_loss']:.4g}."))
    lines += ["", *(f"{key} = {value}" for key, value in row["defaults"].items()), *([""] if row["defaults"] else [])]
    for title, key in (("models in memory", "models"), ("needs", "takes"), ("main failure", "fails")):
        lines += _listed(title, row[key])
    return "\n".join([*lines, *_listed("degrades", row["degrades"])])


def _listed(title: str, told: list[str]) -> list[str]:
    found = []
    for number, text in enumerate(told or ["–"]):
        head = f"{title if number == 0 else '':18}"
        found.append(textwrap.fill(text, _WIDTH, initial_indent=head, subsequent_indent=" " * 18))
    return found


def _indented(text: str) -> str:
    return textwrap.fill(text, _WIDTH, initial_indent="  ", subsequent_indent="  ")


def _axes(algorithm: Algorithm) -> dict[str, Any]:
    """The parts of a row that are at work."""
    found = {field.name: getattr(algorithm, field.name) for field in fields(algorithm)}
    return {axis: part for axis, part in found.items() if callable(part) or axis == "critic" or _pulls(part)}


def _pulls(part: Any) -> bool:
    return is_dataclass(part) and getattr(part, "active", True)


def _said_on(axis: str, part: Any, algorithm: Algorithm) -> Said:
    if isinstance(part, KL):
        said = said_by(part.estimator)
        return said._replace(formula=f"β · ({said.formula.rstrip('.')}) with x = log π/π_ref")
    said = said_by(part)
    # A regression on log π/π_ref is right on all samples, whoever drew them: what its surrogate alone would not be.
    return said._replace(fails="") if axis == "surrogate" and algorithm.regression else said


def _defaults(parts: Mapping[str, Any]) -> Iterator[tuple[str, float | None]]:
    """surrogate.clip.low = 0.2, kl.beta = 0.04: what one would write to change them."""
    for axis, part in parts.items():
        steered = not isinstance(part, KL) or part.target is not None
        where = axis if isinstance(part, KL) or axis == "critic" else f"{axis}.{type(part).__name__}"
        for key in _parameters(part):
            value = getattr(part, key)
            if isinstance(value, int | float) and value is not False and (key != "gain" or steered):
                yield f"{where}.{key}", value


def _parameters(value: Any) -> list[str]:
    return [field.name for field in fields(value)] if is_dataclass(value) and not isinstance(value, type) else []


_FROZEN = "reference, frozen (with LoRA the same weights)"
_KEPT = f"{_FROZEN}; only until its log-probs are kept, where training sees all rows at least once"


def _models(reference: str, critic: bool = False) -> list[str]:
    held = ("policy, trained", reference, "critic, trained (with LoRA the same base)" if critic else "")
    return [model for model in held if model]


def _takes(algorithm: Algorithm) -> Iterator[str]:
    """Found by asking what is refused."""
    yield "prompts and a reward"
    if problems(algorithm, samples_per_prompt=1, updates_per_step=1):
        yield "samples_per_prompt of 2 or more"
    if problems(algorithm, samples_per_prompt=8, updates_per_step=2):
        yield "updates_per_step of 1"
    for name, wanted in algorithm.needs._asdict().items():
        if wanted and name not in ("ref", "critic", "old_logps"):
            yield _NEEDS[name]


_NEEDS = {
    "entropy": "the policy's entropy at each token",
    "draws": "further samples of each prompt, which only its baseline is made of",
    "parts": "a reward of several parts",
    "collisions": "Σ π² of each token's distribution",
}
_DATA = {
    "pairs": "pairs: prompt, chosen, rejected",
    "triples": "triples: prompt, chosen, rejected and a gold completion",
    "steps": "solutions step by step, each step right or wrong",
    "labels": "completions, each with a label: desirable or not",
}


def _passes(needs: Any, loss: Any) -> bool:
    return needs.mismatched or needs.collisions or hasattr(loss, "statistics")


def _sentences(value: Any) -> list[str]:
    """Of a docstring as flowing text. "Dr." ends no sentence, nor does a stop before a small letter."""
    kind = value if inspect.isroutine(value) or isinstance(value, type) else type(value)
    text = " ".join((inspect.getdoc(kind) or "").split())
    if text.startswith(f"{kind.__name__}("):  # what a dataclass says where nobody wrote anything
        return []
    return [s for s in re.split(r"(?<![ (]Dr\.)(?<=[.!?])\s+(?=[^a-z\d])", text) if s]
