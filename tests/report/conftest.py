from pathlib import Path

import fake_run
import pytest

from klimb.report import write_report


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished pipeline with its report; tests only read it."""
    root = fake_run.pipeline(tmp_path_factory.mktemp("pipeline"))
    write_report(root)
    return root


@pytest.fixture(scope="session")
def page(pipeline: Path) -> str:
    return (pipeline / "report.html").read_text(encoding="utf-8")
