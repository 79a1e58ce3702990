"""Every test here takes a device: the CPU in the ordinary suite, so that it is known to work, and a CUDA card where
there is one. `make test-gpu` runs the latter alone."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from world import World, make_world

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when a card is first used


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device here")
    return str(request.param)


@pytest.fixture
def same_order() -> Iterator[None]:
    """On a card sums of gradients take any order unless torch is asked not to."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))
