"""What a reward model has to beat: judges that look at a reply's length alone, or at its words alone.

Each is a logistic regression on the difference of two replies' features, which is the Bradley–Terry model of a linear
score: fitted to the pairs that the reward model is trained on, and measured on those that are held out for it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import softplus

from klimb.types import Preference
from klimb.watch.statistics import Tally, tally_interval

Baseline = Literal["length", "bag_of_words"]
FEATURES: Mapping[Baseline, Callable[[str], Mapping[str, float]]] = {
    "length": lambda text: {"hundreds of characters": len(text) / 100},
    "bag_of_words": lambda text: Counter(re.findall(r"\w+", text.lower())),
}
_RARE = 3
"""A word in fewer training replies says nothing about others."""
_PENALTY = 1.0
"""λ of ½ λ |w|² beside the sum of the losses: scikit-learn's default."""


def accuracy_of(differences: Tensor) -> dict[str, float]:
    """differences [P]: chosen minus rejected. The share above 0 (a tie is half) with its 95 % interval over pairs."""
    return with_interval([Tally.of([value]) for value in ((differences.sign() + 1) / 2).tolist()])


def with_interval(right: Sequence[Tally]) -> dict[str, float]:
    """Of each item and all that it asks, 1 where it is right. The share of it, with its 95 % interval over items."""
    interval = tally_interval(right)
    return {"accuracy": interval.mean, "accuracy_low": interval.low, "accuracy_high": interval.high}


def measure(
    names: Sequence[Baseline], training: Sequence[Preference], held_out: Sequence[Preference],
    decode: Callable[[list[int]], str],
) -> dict[str, dict[str, float]]:  # fmt: skip
    """The held-out accuracy of each. decode: the tokens of a reply as text."""
    found: dict[str, dict[str, float]] = {}
    for name in names:
        fitted, asked = (
            [(FEATURES[name](decode(pair.chosen)), FEATURES[name](decode(pair.rejected))) for pair in pairs]
            for pairs in (training, held_out)
        )
        replies = Counter(feature for pair in fitted for reply in pair for feature in reply)
        columns = {feature: place for place, feature in enumerate(f for f, n in replies.items() if n >= _RARE)}
        found[name] = accuracy_of(_differences(asked, columns) @ _fit(_differences(fitted, columns)))
    return found


def _differences(pairs: Sequence[Sequence[Mapping[str, float]]], columns: Mapping[str, int]) -> Tensor:
    """[P, F], sparse: the features of the chosen reply minus those of the rejected one."""
    found = [
        (row, columns[feature], sign * value)
        for row, pair in enumerate(pairs)
        for sign, reply in zip((1.0, -1.0), pair)
        for feature, value in reply.items()
        if feature in columns
    ]
    rows, columns_of, values = zip(*found) if found else ((), (), ())
    size = (len(pairs), len(columns))
    at = torch.tensor([rows, columns_of], dtype=torch.long)
    return torch.sparse_coo_tensor(
        at, torch.tensor(values, dtype=torch.float64), size, check_invariants=False
    ).coalesce()


def _fit(differences: Tensor) -> Tensor:
    """w [F] that minimises Σ −log σ(difference · w) + ½ λ |w|²."""
    weights = torch.zeros(differences.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weights], max_iter=200, tolerance_grad=1e-8, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = softplus(-(differences @ weights)).sum() + _PENALTY / 2 * weights.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return weights.detach()
