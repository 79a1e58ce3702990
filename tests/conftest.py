"""Test helpers are plain modules beside the tests: their folders are importable."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from klimb import native

for folder in ("data", "models", "objective", "parity", "report", "rewards", "stages"):
    sys.path.insert(0, str(Path(__file__).parent / folder))

_SLOW = (
    "commands/", "examples/", "gpu/", "parity/", "report/", "stages/", "test_arena.py", "test_benchmarks.py",
    "test_examples.py", "test_readme.py", "test_recipes.py",  # they start whole runs
    "data/test_sandbox.py", "native/test_build.py", "rewards/test_judge_server.py", "rewards/test_reward_code.py",
    "rewards/test_reward_functions.py", "rewards/test_reward_math.py", "rewards/test_reward_worker.py",
    "rewards/test_sandbox_escapes.py",  # they start processes or wait for something to end
    "lab/test_bandit_fixed_points.py", "models/test_models_outline.py", "rollout/test_rollout_mixture.py",
)  # fmt: skip
"""Left out by `make test-fast`, beside what is marked where it stands."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if item.path.relative_to(here).as_posix().startswith(_SLOW):
            item.add_marker(pytest.mark.slow)


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
