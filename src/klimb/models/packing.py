"""Rows → one flat run of tokens: no padding enters a model, and a prompt enters once for all its completions."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from klimb.batch import Row, TokenBatch
from klimb.errors import KlimbError, out_of_memory
from klimb.models.attention import PackedAttention

T = TypeVar("T")


@dataclass(frozen=True)
class Packed:
    """N flat tokens, M marked tokens of [B, T], R rows.

    tokens, positions [N]. predictors [M]: flat place of the token whose hidden state predicts the marked token (so
    of the state that its value is of); marked [M]: its own flat place; targets [M]: its id. last [R]: flat place of
    each row's last token, and last_sample [R] whose row it is. read, ends: the places of predictors and of last, once
    each and in order, and some more where `pack` fills up to a multiple. longest: tokens of the longest row.
    """

    tokens: Tensor
    positions: Tensor
    plan: PackedAttention
    predictors: Tensor
    marked: Tensor
    targets: Tensor
    last: Tensor
    last_sample: Tensor
    read: Tensor
    ends: Tensor
    longest: int


def pack(batch: TokenBatch, device: torch.device, whole: int = 1) -> Packed:
    """Lay out a batch. Neighbouring rows with equal prompts share it; a completion continues it in its own branch.

    The lengths of the run, of `read` and of `ends` are multiples of `whole`: tokens that fill up see only each other,
    and nobody takes what is computed of them.
    """
    tokens: list[int] = []
    positions: list[int] = []
    spans: list[tuple[range, range]] = []
    predictors: list[int] = []
    marked: list[int] = []
    targets: list[int] = []
    last: list[int] = []
    last_sample: list[int] = []
    trunk, trunk_prompt = range(0), None
    for sample, rows in enumerate(batch.rows):
        for row in rows:
            if trunk_prompt is None or not _equal(trunk_prompt, row.prompt):
                trunk, trunk_prompt = range(len(tokens), len(tokens) + len(row.prompt)), row.prompt
                if row.prompt:
                    spans.append((trunk, range(0)))
                tokens.extend(row.prompt)
                positions.extend(range(len(row.prompt)))
            start = len(tokens)
            if row.completion:
                spans.append((range(start, start + len(row.completion)), trunk))
            tokens.extend(row.completion)
            positions.extend(range(len(trunk), len(trunk) + len(row.completion)))
            if row.completion and row.mask[0] and not trunk:
                raise ValueError(f"sample {batch.ids[sample]}: its first token has nothing that predicts it; "
                                 "leave it unmarked or give the row a prompt (a BOS is enough)")  # fmt: skip
            before = itertools.chain(trunk[-1:], range(start, len(tokens)))
            predictors.extend(itertools.compress(before if trunk else itertools.chain([-1], before), row.mask))
            marked.extend(itertools.compress(range(start, len(tokens)), row.mask))
            targets.extend(itertools.compress(row.completion, row.mask))
            last.append(len(tokens) - 1 if row.completion else trunk[-1])
            last_sample.append(sample)
    if filler := -len(tokens) % whole:
        spans.append((range(len(tokens), len(tokens) + filler), range(0)))
        tokens.extend([0] * filler)
        positions.extend([0] * filler)
    as_tensor = lambda values: torch.tensor(values, dtype=torch.long, device=device)  # noqa: E731
    read, ends = (as_tensor(_whole(places, len(tokens), whole)) for places in (predictors, last))
    return Packed(
        as_tensor(tokens), as_tensor(positions), PackedAttention(spans, device), as_tensor(predictors),
        as_tensor(marked), as_tensor(targets), as_tensor(last), as_tensor(last_sample), read, ends,
        longest=1 + max(positions, default=-1),
    )  # fmt: skip


def _whole(places: Sequence[int], tokens: int, whole: int) -> list[int]:
    """The places once each and in order, and so many others that their number is a multiple of `whole`."""
    wanted = set(places)
    others = (place for place in range(tokens) if place not in wanted)
    return sorted(wanted | set(itertools.islice(others, -len(wanted) % whole)))


def _equal(a: Sequence[int], b: Sequence[int]) -> bool:
    return a is b or (len(a) == len(b) and list(a) == list(b))


def flat_length(rows: Sequence[Row], prompt: Sequence[int] | None = None) -> int:
    """Flat tokens that these rows add after a row with this prompt (shared when equal)."""
    length = 0
    for row in rows:
        length += len(row.completion) if prompt is not None and _equal(prompt, row.prompt) else len(row)
        prompt = row.prompt
    return length


def split_by_budget(batch: TokenBatch, budget: int, shares: int = 1) -> list[list[int]]:
    """Samples → micro-batches of at most `budget` flat tokens (a longer sample is alone), by lengths alone. What
    fills a run up is not counted.

    Samples of one group stay neighbours, so that they share their prompt, and the parts are balanced: their number
    is what the budget asks for, up to a multiple of `shares`, then each takes its share of the tokens.
    """
    units = _units(batch)
    whole = flat_length([row for unit in units for i in unit for row in batch.rows[i]])
    parts = -(-whole // (budget * shares)) * shares
    share = whole / max(parts, 1)
    micro_batches: list[list[int]] = []
    length, prompt = 0, None
    for unit in units:
        rows = [row for i in unit for row in batch.rows[i]]
        grown = length + flat_length(rows, prompt)
        # The next part starts when this one has its share, unless the unit lies nearer to this part than to the next.
        share_is_full = len(micro_batches) < parts and grown - share > share - length
        if not micro_batches or grown > budget or share_is_full:
            micro_batches.append([])
            grown = flat_length(rows)
        micro_batches[-1].extend(unit)
        length, prompt = grown, rows[-1].prompt
    return micro_batches


@dataclass
class Budget:
    """Flat tokens of a micro-batch in passes without gradient, as many as fit: it falls where they do not.

    say: gets a line then.
    """

    tokens: int
    say: Callable[[str], None] = lambda line: None


def in_parts(
    batch: TokenBatch, budget: int | Budget, compute: Callable[[TokenBatch], T]
) -> Iterator[tuple[list[int], T]]:
    """`compute` on micro-batches, each with its samples. One that does not fit is computed in halves, to the same
    result. Raises KlimbError where there is nothing to take apart."""
    budget = budget if isinstance(budget, Budget) else Budget(budget)
    parts = deque(split_by_budget(batch, budget.tokens))
    while parts:
        try:
            found = compute(batch.select(parts[0]))
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            found = None  # here what was computed is still held, below it is not
        if found is not None:
            yield parts.popleft(), found
            continue
        _shrink(budget, batch.select(parts[0]))
        left = [i for part in parts for i in part]
        parts = deque([left[i] for i in part] for part in split_by_budget(batch.select(left), budget.tokens))


def _shrink(budget: Budget, part: TokenBatch) -> None:
    """Halve the budget below this micro-batch."""
    length = flat_length([row for rows in part.rows for row in rows])
    if len(split_by_budget(part, budget=1)) == 1:
        raise KlimbError(
            f"{' and '.join(part.ids)} does not fit into the memory",
            why=f"{length} tokens at once are the least that it takes, without gradients",
            fix="use shorter sequences (max_tokens, max_prompt_tokens), or a device with more memory",
        )
    budget.tokens = length // 2
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # blocks of the size that failed are of no use to smaller ones
    budget.say(
        f"{length} tokens without gradients do not fit into the memory; from here on {budget.tokens} are computed at "
        "once, the result is the same"
    )


def _units(batch: TokenBatch) -> list[list[int]]:
    """What may not be torn apart: samples, or whole groups; those of a group are neighbours in any case."""
    order = sorted(range(len(batch)), key=lambda i: (int(batch.group[i]), i))
    if not batch.whole_groups:
        return [[i] for i in order]
    return [list(unit) for _, unit in itertools.groupby(order, key=lambda i: int(batch.group[i]))]
