"""The samples of one update as tensors.

The algebra in `objective/` sees ``[B, T]``: B samples, T = the most tokens that the policy chose in one of them, left
aligned, and `mask` says which exist. Environment tokens and prompts are not in it, and a sample that became several
rows (sequences the model computes on) is still one line: so advantages and denominators count samples, never rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from klimb.types import Sample


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence of a sample: a context, then tokens of which `mask` marks the ones to compute log-probs of.

    The marked tokens of a sample's rows, in order, are the T axis of its line in the batch.
    """

    prompt: Sequence[int]
    completion: Sequence[int]
    mask: Sequence[bool]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.completion)


@dataclass(frozen=True, slots=True)
class BatchTotals:
    """Denominators over the *whole* update: all micro-batches, all ranks. Every loss is divided by these, once.

    tokens: marked tokens; samples: samples with at least one; groups: prompts with at least one such sample.
    """

    tokens: int
    samples: int
    groups: int

    @staticmethod
    def of(mask: Tensor, group: Tensor) -> BatchTotals:
        """mask [B, T], group [B]."""
        present = mask.any(dim=1)
        return BatchTotals(int(mask.sum()), int(present.sum()), int(group[present].unique().numel()))


@dataclass(frozen=True)
class TokenBatch:
    """B samples. `columns` holds further tensors by their glossary name, [B] or [B, T] (zero where not masked)."""

    rows: list[list[Row]]
    mask: Tensor
    group: Tensor
    ids: list[str]
    columns: dict[str, Tensor] = field(default_factory=dict)
    whole_groups: bool = False
    """A loss that compares the samples of a group (pairs) may not see them in different micro-batches."""

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, name: str) -> Tensor:
        return self.columns[name]

    def get(self, name: str) -> Tensor | None:
        return self.columns.get(name)

    def with_columns(self, **columns: Tensor) -> TokenBatch:
        return replace(self, columns={**self.columns, **columns})

    def to(self, device: torch.device) -> TokenBatch:
        columns = self.columns
        if device.type == "mps":  # it has no float64
            columns = {name: c.float() if c.dtype == torch.float64 else c for name, c in columns.items()}
        columns = {name: column.to(device) for name, column in columns.items()}
        return replace(self, mask=self.mask.to(device), group=self.group.to(device), columns=columns)

    def select(self, samples: Sequence[int]) -> TokenBatch:
        """The named samples, T cut to the longest of them."""
        index = torch.as_tensor(samples, dtype=torch.long, device=self.mask.device)
        mask = self.mask[index]
        width = max(int(mask.sum(dim=1).max()), 1) if len(index) else 1
        columns = {
            name: column[index] if column.ndim == 1 else column[index][:, :width]
            for name, column in self.columns.items()
        }
        return TokenBatch(
            [self.rows[i] for i in samples], mask[:, :width], self.group[index], [self.ids[i] for i in samples],
            columns, self.whole_groups,
        )  # fmt: skip

    @property
    def totals(self) -> BatchTotals:
        return BatchTotals.of(self.mask, self.group)

    @staticmethod
    def from_rows(
        rows: list[list[Row]], group: Sequence[int], ids: Sequence[str], whole_groups: bool = False
    ) -> TokenBatch:
        """Rows by sample; group [B] numbers the prompts."""
        counts = torch.tensor([sum(sum(row.mask) for row in sample) for sample in rows], dtype=torch.long)
        width = max(int(counts.max()), 1) if len(counts) else 1
        mask = torch.arange(width)[None, :] < counts[:, None]
        return TokenBatch(rows, mask, torch.as_tensor(group, dtype=torch.long), list(ids), {}, whole_groups)


def pad_tokens(values: Sequence[Sequence[float]], mask: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Ragged per-token numbers of B samples → [B, T], zero where not masked."""
    padded = torch.zeros(mask.shape, dtype=dtype)
    padded[mask] = torch.tensor([v for line in values for v in line], dtype=dtype)
    return padded


def sample_rows(prompt: Sequence[int], sample: Sample) -> list[Row]:
    """The one row of a sample that was generated in a single run of tokens."""
    return [Row(prompt, sample.tokens, sample.mask)]
