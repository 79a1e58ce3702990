"""Where the gradient of a weight is summed over micro-batches.

A weight of 32 bits has it in `grad`. One of 16 bits is a working copy, and the sum is its master's: the learner hangs
it on the copy as `main_grad`, in float32. What a backward pass adds there itself is not written, read and added again
for every micro-batch; for the large matrices at both ends of a model that takes as long as computing it. So
`torch.autograd.grad` through a model adds there, too.
"""

from __future__ import annotations

from torch import Tensor, nn


def share(weight: nn.Parameter, total: Tensor | None) -> None:
    """From here on backward passes may add to `total`; None: to nothing but `grad`."""
    weight.main_grad = total  # type: ignore[attr-defined]


def sum_so_far(weight: Tensor) -> Tensor | None:
    """What to add to; None before the first micro-batch, and for what is not a weight itself."""
    if not weight.is_leaf:
        return None
    total: Tensor | None = getattr(weight, "main_grad", None)
    return weight.grad if total is None else total
