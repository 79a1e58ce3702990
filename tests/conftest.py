"""Test helpers are plain modules beside the tests: their folders are importable."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from klimb import native

for folder in ("data", "models", "objective", "parity", "report", "rewards", "stages"):
    sys.path.insert(0, str(Path(__file__).parent / folder))


@pytest.fixture(params=["native", "torch"])
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    """Both ways of computing attention and small layers."""
    if request.param == "native" and (reason := native.why_not()) is not None:
        pytest.skip(f"no kernels: {reason}")
    native.use(request.param == "native")
    yield request.param
    native.use(True)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What tests prepare stays out of the cache of whoever runs them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield
