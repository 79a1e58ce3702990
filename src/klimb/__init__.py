"""klimb: climb the reward, mind the KL. A library for post-training language models."""

from __future__ import annotations

from typing import Any

__version__ = "0.1.1"
__all__ = ["run"]


def __getattr__(name: str) -> Any:
    """``klimb.run`` is loaded on first use, so that ``import klimb`` stays free of torch."""
    if name == "run":
        from klimb.stages.pipeline import run

        return run
    raise AttributeError(f"module 'klimb' has no attribute {name!r}")
