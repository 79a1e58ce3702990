"""The split into micro-batches, the packing order and the number of ranks change nothing but rounding."""

from __future__ import annotations

import functools
import json
import os
import random
from pathlib import Path

import pytest
import torch
from families import VOCABULARY
from filelock import FileLock
from processes import run_ranks
from safetensors.torch import load_file
from updates import BUDGETS, UPDATES, WHOLE, Update, outcome, policy_model, relative_error, rl_batch

from klimb.batch import Row, TokenBatch
from klimb.objective.algorithms import ALGORITHMS
from klimb.objective.surrogate import ratio
from klimb.stages import sft

DTYPES = (torch.float32, torch.float64)
BOUND = {torch.float32: 1e-5, torch.float64: 1e-10}


@functools.cache
def whole(name: str, dtype: torch.dtype) -> tuple[Update, dict[str, torch.Tensor], dict[str, float]]:
    """The reference: everything in one micro-batch."""
    update = UPDATES[name](dtype)
    return update, *outcome(update, budget=WHOLE)


def assert_same_metrics(found: dict[str, float], expected: dict[str, float], dtype: torch.dtype) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        # Means of numbers of either sign may cancel: hence an absolute part, of numbers of the order of 1.
        assert found[name] == pytest.approx(value, rel=BOUND[dtype], abs=BOUND[dtype] / 10), name


def shuffled(batch: TokenBatch, seed: int) -> TokenBatch:
    """Other neighbours for every row: groups change places and numbers, samples theirs within the group (pairs not)."""
    draw = random.Random(seed)
    labels = batch.group.unique().tolist()
    places = draw.sample(labels, len(labels))
    order = list(range(len(batch)))
    if not batch.whole_groups:
        draw.shuffle(order)
    order.sort(key=lambda i: places[labels.index(int(batch.group[i]))])
    moved = batch.select(order)
    group = torch.tensor([places[labels.index(int(g))] for g in moved.group])
    return TokenBatch(moved.rows, moved.mask, group, moved.ids, moved.columns, moved.whole_groups)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", UPDATES)
def test_splits_and_order_give_the_same_gradient(name: str, dtype: torch.dtype) -> None:
    update, gradients, measured = whole(name, dtype)
    for batch, budget in [(update.batch, 1), (update.batch, 60), (shuffled(update.batch, 1), WHOLE),
                          (shuffled(update.batch, 2), 45)]:  # fmt: skip
        found, facts = outcome(update, budget=budget, batch=batch)
        assert relative_error(found, gradients) <= BOUND[dtype]
        assert_same_metrics(facts, measured, dtype)


BOUNDED = [n for n, a in ALGORITHMS.items() if a.needs.old_logps and a.surrogate is not ratio and n != "dro_old"]


@pytest.mark.parametrize("name", BOUNDED)
def test_the_clip_is_at_work(name: str) -> None:
    """Else the tests above would say nothing about it. (Only one sample of a group has an advantage under pass@k.)"""
    assert 0.05 <= whole(name, torch.float32)[2]["clip_fraction"] <= 0.3


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[dict, dict]]:
    """Of each rank: gradients and metrics by dtype, update and budget. Computed once for all of pytest's workers."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "two-ranks"
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            made = tmp_path_factory.mktemp("ranks")
            run_ranks([Path(__file__).with_name("updates.py"), made], ranks=2, timeout=600)
            made.rename(folder)
    return [
        (load_file(folder / f"gradients-{r}.safetensors"), json.loads((folder / f"metrics-{r}.json").read_text()))
        for r in range(2)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", UPDATES)
def test_two_ranks_give_the_gradient_and_metrics_of_one(name: str, dtype: torch.dtype, two_ranks: list) -> None:
    _, gradients, measured = whole(name, dtype)
    for budget in BUDGETS:
        key = f"{dtype}/{name}/{budget}"
        for tensors, facts in two_ranks:
            found = {n: tensors[f"{key}/{n}"] for n in gradients}
            assert sum(k.startswith(f"{key}/") for k in tensors) == len(gradients)
            assert relative_error(found, gradients) <= BOUND[dtype]
            assert_same_metrics(facts[key], measured, dtype)
        assert all(torch.equal(two_ranks[0][0][f"{key}/{n}"], two_ranks[1][0][f"{key}/{n}"]) for n in gradients)


# Samples and rows ---------------------------------------------------------------------------------------------------


def two_turns(split: bool) -> TokenBatch:
    """Six samples in three groups; the policy speaks, a tool answers, the policy speaks again. As one row each, or
    with the second turn as a row of its own whose prompt is all that came before."""
    draw = random.Random(11)
    tokens = lambda n: [draw.randrange(3, VOCABULARY) for _ in range(n)]  # noqa: E731
    rows = []
    for _ in range(3):
        prompt = tokens(draw.randint(2, 6))
        for _ in range(2):
            first, tool, second = (tokens(draw.randint(1, 7)) for _ in range(3))
            if split:
                rows.append([Row(prompt, first, [True] * len(first)),
                             Row([*prompt, *first, *tool], second, [True] * len(second))])  # fmt: skip
            else:
                mask = [True] * len(first) + [False] * len(tool) + [True] * len(second)
                rows.append([Row(prompt, [*first, *tool, *second], mask)])
    return TokenBatch.from_rows(rows, [0, 0, 1, 1, 2, 2], [f"sample {i}" for i in range(6)])


def turns_update(name: str, dtype: torch.dtype, split: bool) -> Update:
    """The named update on the two turns; credit is that of whole samples however they are laid out."""
    if name == "sft":
        policy = policy_model(dtype)
        return Update(policy.trainable(), two_turns(split), functools.partial(sft.sft_loss, policy))
    update = UPDATES[name](dtype)
    known = rl_batch(ALGORITHMS[name].resolve(max_length=12), policy_model(dtype), two_turns(False))
    return Update(update.parameters, two_turns(split).with_columns(**known.columns), update.loss)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["sft", *ALGORITHMS])
def test_a_sample_of_two_turns_may_be_one_row_or_two(name: str, dtype: torch.dtype) -> None:
    """Advantages and denominators count samples, never rows."""
    one, two = (turns_update(name, dtype, split) for split in (False, True))
    gradients, measured = outcome(one, budget=WHOLE)
    for found, facts in [outcome(one, budget=20), outcome(two, budget=WHOLE), outcome(two, budget=20)]:
        assert relative_error(found, gradients) <= BOUND[dtype]
        assert_same_metrics(facts, measured, dtype)


def test_a_row_that_counted_as_a_sample_would_be_seen() -> None:
    """The mean over sequences, taken over rows as a wrong batch would: another gradient."""
    update = turns_update("grpo", torch.float32, split=True)
    batch = update.batch
    torn = TokenBatch.from_rows([[row] for rows in batch.rows for row in rows], range(12), ["row"] * 12)
    columns = {
        name: torch.zeros(torn.mask.shape, dtype=column.dtype).masked_scatter(torn.mask, column[batch.mask])
        for name, column in batch.columns.items()
        if column.ndim == 2
    }
    gradients, _ = outcome(update, budget=WHOLE)
    counted, _ = outcome(update, budget=WHOLE, batch=torn.with_columns(**columns))
    assert relative_error(counted, gradients) > 1e-2
