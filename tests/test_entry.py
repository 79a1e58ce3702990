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


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("torch.empty(1 << 60, dtype=torch.uint8)", "klimb: the memory ran out: [enforce fail"),
        ("bytearray(1 << 60)", "klimb: the memory ran out: MemoryError; `klimb doctor"),
        ("torch.empty(2, 'three')", "Traceback"),
    ],
    ids=["torch", "python", "fault"],
)
def test_memory_that_ran_out_is_said_in_a_line(fault: str, told: str) -> None:
    run = f"import torch, klimb.cli as cli\ndef app(standalone_mode): {fault}\ncli.app = app\ncli.main()"
    said = subprocess.run([sys.executable, "-c", run, "doctor"], capture_output=True, text=True)
    assert said.returncode == 1
    assert said.stderr.startswith(told)
    assert (said.stderr.count("\n") == 1) == told.startswith("klimb")


def test_a_command_that_is_broken_off_is_no_fault() -> None:
    """typer's Abort, which an end of the input becomes, is a RuntimeError."""
    run = "import klimb.cli as cli\ndef app(standalone_mode): raise cli.typer.Abort\ncli.app = app\ncli.main()"
    said = subprocess.run([sys.executable, "-c", run, "doctor"], capture_output=True, text=True)
    assert (said.returncode, said.stderr.count("\n")) == (130, 1)
