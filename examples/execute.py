"""Executes a notebook in an empty folder and stores its outputs: python examples/execute.py examples/first-steps.ipynb

Needs nbclient and ipykernel (pip install nbclient ipykernel), which klimb itself does without.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient


def execute(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(notebook, timeout=300, resources={"metadata": {"path": folder}}).execute()
    for cell in notebook.cells:
        cell.get("metadata", {}).pop("execution", None)  # when each cell ran
    nbformat.write(notebook, path)


if __name__ == "__main__":
    os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"  # tqdm's, where there are no ipywidgets
    for name in sys.argv[1:]:
        execute(Path(name))
