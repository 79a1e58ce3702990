"""The ways in: the command, the module, the version."""

import subprocess
import sys
from importlib.metadata import version

import pytest


def klimb(*words: str) -> str:
    return subprocess.run([sys.executable, "-m", "klimb", *words], capture_output=True, text=True, check=True).stdout


def test_the_module_is_the_command() -> None:
    assert klimb("--version") == f"klimb {version('klimb')}\n"
    assert "quickstart" in klimb("--help")
    assert klimb() == klimb("--help")


def test_a_command_may_be_imported_before_the_command_line() -> None:
    """The file of a command has its name, and takes it in the package when it is loaded."""
    code = "import klimb.commands.new, klimb.commands.export, klimb.cli; klimb.cli.main()"
    said = subprocess.run([sys.executable, "-c", code, "new", "--help"], capture_output=True, text=True)
    assert said.returncode == 0, said.stderr[-500:]
    assert "A folder to begin with" in said.stdout


@pytest.mark.parametrize("words", ["1 << 60, dtype=torch.uint8", "2, 'three'"])
def test_memory_that_ran_out_is_said_in_a_line_and_a_fault_of_ours_is_not(words: str) -> None:
    code = (
        "import torch, klimb.cli as cli\n"
        f"def app(standalone_mode): torch.empty({words})\n"
        "cli.app = app\n"
        "cli.main()"
    )  # fmt: skip
    said = subprocess.run([sys.executable, "-c", code, "doctor"], capture_output=True, text=True)
    assert said.returncode == 1
    if "uint8" in words:
        assert said.stderr.startswith("klimb: the memory ran out: ")
        assert "klimb doctor" in said.stderr
        assert said.stderr.count("\n") == 1
    else:
        assert "Traceback" in said.stderr
