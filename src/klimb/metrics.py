"""Metrics with a declared reduction, so that micro-batches and ranks can be merged without guessing.

A loss returns ``{"entropy": mean(per_token, mask), "ratio/max": largest(ratio)}``; nobody averages averages.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor


class Metric(NamedTuple):
    """`value` and `weight` are float64 scalars; a mean holds the weighted *sum* in `value` until it is read."""

    kind: Literal["mean", "sum", "max", "min"]
    value: Tensor
    weight: Tensor

    def result(self) -> float:
        if self.kind == "mean":
            return float(self.value / self.weight) if float(self.weight) else 0.0
        return float(self.value)


Metrics = dict[str, Metric]


def _scalar(value: Tensor | float) -> Tensor:
    return _double(torch.as_tensor(value))


def _double(values: Tensor) -> Tensor:
    """Where they are, but for mps, which has no float64."""
    return _held(values.detach()).to(torch.float64)


def _held(values: Tensor) -> Tensor:
    return values.cpu() if values.device.type == "mps" else values


def mean(values: Tensor, mask: Tensor | None = None) -> Metric:
    """Mean of `values` where `mask` holds (any shape, the same for both)."""
    if mask is None:
        return Metric("mean", _double(values).sum(), _scalar(values.numel()))
    mask = _held(mask)
    kept = torch.where(mask, _double(values), 0.0)
    return Metric("mean", kept.sum(), _scalar(mask.sum()))


def ratio(total: Tensor | float, weight: Tensor | float) -> Metric:
    """A mean of which sum and weight are known."""
    return Metric("mean", _scalar(total), _scalar(weight))


def total(value: Tensor | float) -> Metric:
    return Metric("sum", _scalar(value), _scalar(1.0))


def largest(values: Tensor, mask: Tensor | None = None) -> Metric:
    """Maximum where `mask` holds; -inf of nothing."""
    values = _double(values)
    if mask is not None:  # a selection by mask would wait for the device, to know its size
        values = values.masked_fill(~_held(mask), -torch.inf)
    return Metric("max", values.max() if values.numel() else _scalar(-torch.inf), _scalar(1.0))


def merge(parts: Iterable[Mapping[str, Metric]]) -> Metrics:
    """One dict out of those of all micro-batches or ranks."""
    merged: Metrics = {}
    for part in parts:
        for name, metric in part.items():
            merged[name] = _combine(merged[name], metric) if name in merged else metric
    return merged


def _combine(a: Metric, b: Metric) -> Metric:
    if a.kind != b.kind:
        raise ValueError(f"a metric was declared both {a.kind} and {b.kind}")
    if a.kind == "max":
        return a._replace(value=torch.maximum(a.value, b.value))
    if a.kind == "min":
        return a._replace(value=torch.minimum(a.value, b.value))
    return a._replace(value=a.value + b.value, weight=a.weight + b.weight)


def results(metrics: Mapping[str, Metric]) -> dict[str, float]:
    """Plain floats for a file or a person."""
    return {name: metric.result() for name, metric in metrics.items()}
