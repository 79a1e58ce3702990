from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from world import World, make_world


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Path]:
    """A folder to stand in: `runs/` is made where the command is given."""
    before = Path.cwd()
    os.chdir(tmp_path)
    yield tmp_path
    os.chdir(before)
