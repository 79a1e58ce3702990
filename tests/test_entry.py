"""The ways in: the command, the module, the version."""

import subprocess
import sys
from importlib.metadata import version


def klimb(*words: str) -> str:
    return subprocess.run([sys.executable, "-m", "klimb", *words], capture_output=True, text=True, check=True).stdout


def test_the_module_is_the_command() -> None:
    assert klimb("--version") == f"klimb {version('klimb')}\n"
    assert "quickstart" in klimb("--help")
    assert klimb() == klimb("--help")
