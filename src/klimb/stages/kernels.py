"""Who computes attention and the small layers on a CPU: chosen when a run begins, and kept when it goes on."""

from __future__ import annotations

from collections.abc import Callable

import torch

from klimb import native
from klimb.errors import ConfigError
from klimb.runtime.run import Run

TORCH = "torch"


def choose(wanted: str, device: torch.device, say: Callable[[str], None]) -> str:
    """`torch`, or which build of klimb's own; said where those would be faster and cannot be had.

    Raises ConfigError when they are asked for.
    """
    on_cpu = device.type == "cpu"
    reason = native.why_not() if on_cpu else f"device={device.type}: they compute on a CPU"
    if wanted == "native" and reason is not None:
        raise ConfigError("kernels=native cannot be had", why=reason, fix="set kernels=auto")
    if wanted == "auto" and on_cpu and reason is not None:
        say(f"kernels: torch's operators, slower than klimb's own ({reason})")
    return TORCH if wanted == TORCH or reason is not None else f"native {native.made_of()}"


def use(run: Run, chosen: str) -> None:
    """As when the run began, or as near to that as this machine comes."""
    native.use(chosen != TORCH)
    if chosen not in (TORCH, f"native {native.made_of()}"):
        reason = native.why_not() or "those of today come from another compiler, processor or version of klimb"
        run.report(
            f"the kernels that it began with are not here: the bits may differ from an uninterrupted run ({reason})"
        )
