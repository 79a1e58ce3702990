"""AdamW with moments of 8 bits: two bytes a parameter where torch keeps eight.

Blocks of 256 neighbours share a scale, their largest absolute value (Dettmers et al. 2021, arXiv 2110.02861). Between
it and zero the codes lie at powers of a line, c³ for the first moment and c⁴ for the second, which is finer near zero
than near the scale, as the paper's table is. A code is rounded at random, up with the probability that makes its mean
exact: the second moment moves by 0.1 % a step and the codes are 1 % apart, to the nearest it would stay where it is.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

BLOCK = 256
SMALLEST = 4096
"""Parameters below this size (norms, biases) keep their moments in fp32: they are few, and every update counts."""
_CHUNK = BLOCK << 14
"""Elements in fp32 at once, 4.2 million: the memory that a step takes for itself."""
_POWERS = {"exp_avg": 3, "exp_avg_sq": 4}


class AdamW8bit:
    """The part of torch.optim.AdamW that the learner uses. A parameter without gradient is left alone."""

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float, betas: tuple[float, float], eps: float, weight_decay: float
    ) -> None:
        self.param_groups: list[dict[str, Any]] = [{"params": list(params), "lr": lr}]
        self.betas, self.eps, self.weight_decay = betas, eps, weight_decay
        self.state: dict[Tensor, dict[str, Tensor]] = {}

    @torch.no_grad()
    def step(self) -> None:
        (group,) = self.param_groups
        for number, parameter in enumerate(group["params"]):
            if parameter.grad is None:
                continue
            state = self.state.setdefault(parameter, {}) or self._begin(parameter)
            state["step"] += 1
            step = int(state["step"])
            noise = torch.Generator(parameter.device).manual_seed(step << 24 | number)
            flat, grad = parameter.reshape(-1), parameter.grad.reshape(-1)
            for start in range(0, len(flat), _CHUNK):
                part = slice(start, start + _CHUNK)
                moments = {key: _read(state, key, part).to(flat.dtype) for key in _POWERS}
                self._move(flat[part], grad[part], **moments, lr=group["lr"], step=step)
                for key, moment in moments.items():
                    _write(state, key, part, moment, noise)
            if flat.data_ptr() != parameter.data_ptr():  # a matrix stored by column
                parameter.copy_(flat.view_as(parameter))

    def _begin(self, parameter: Tensor) -> dict[str, Tensor]:
        state = self.state[parameter]
        state["step"] = torch.zeros((), device=parameter.device)
        for key in _POWERS:
            if parameter.numel() < SMALLEST:
                state[key] = torch.zeros(parameter.numel(), dtype=parameter.dtype, device=parameter.device)
                continue
            codes = torch.int8 if key == "exp_avg" else torch.uint8
            state[key] = torch.zeros(parameter.numel(), dtype=codes, device=parameter.device)
            state[f"{key}_scale"] = torch.zeros(-(-parameter.numel() // BLOCK), device=parameter.device)
        return state

    def _move(self, weight: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, lr: float, step: int) -> None:
        """AdamW (arXiv 1711.05101, algorithm 2), in place."""
        first, second = self.betas
        exp_avg.lerp_(grad, 1 - first)
        exp_avg_sq.mul_(second).addcmul_(grad, grad, value=1 - second)
        weight.mul_(1 - lr * self.weight_decay)
        root = (exp_avg_sq / (1 - second**step)).sqrt_().add_(self.eps)
        weight.addcdiv_(exp_avg, root, value=-lr / (1 - first**step))


def _read(state: dict[str, Tensor], key: str, part: slice) -> Tensor:
    """The moment of these elements, as a number: code · |code|^(power − 1) · scale, codes from −1 to 1."""
    stored = state[key][part]
    if f"{key}_scale" not in state:
        return stored
    scales = _scales(state, key, part, len(stored))
    codes = stored.float() / torch.iinfo(stored.dtype).max
    return codes.abs().pow_(_POWERS[key] - 1).mul_(codes).mul_(scales)


def _write(state: dict[str, Tensor], key: str, part: slice, moment: Tensor, noise: torch.Generator) -> None:
    if f"{key}_scale" not in state:
        return  # it was changed in place
    moment = moment.float()
    blocks = pad(moment, (0, -len(moment) % BLOCK)).view(-1, BLOCK)
    state[f"{key}_scale"][part.start // BLOCK : -(-part.stop // BLOCK)] = blocks.abs().amax(dim=1)
    scales = _scales(state, key, part, len(moment))
    share = (moment / scales.clamp_min(torch.finfo(torch.float32).tiny)).abs()
    power, largest = _POWERS[key], torch.iinfo(state[key].dtype).max
    codes = share.pow(1 / power).mul_(largest).floor_()
    below, above = (codes / largest).pow_(power), ((codes + 1) / largest).pow_(power)
    codes += torch.rand(codes.shape, generator=noise, device=codes.device) < (share - below) / (above - below)
    codes.clamp_max_(largest)
    if key == "exp_avg_sq":  # zero would be divided by
        codes = torch.where(moment > 0, codes.clamp_min_(1), codes)
    state[key][part] = codes.mul_(moment.sign()).to(state[key].dtype)


def _scales(state: dict[str, Tensor], key: str, part: slice, length: int) -> Tensor:
    """The scale of each of these elements."""
    blocks = state[f"{key}_scale"][part.start // BLOCK : -(-part.stop // BLOCK)]
    return blocks.repeat_interleave(BLOCK)[:length]
