"""Test helpers are plain modules beside the tests: their folders are importable."""

from __future__ import annotations

import sys
from pathlib import Path

for folder in ("data", "models", "report", "stages"):
    sys.path.insert(0, str(Path(__file__).parent / folder))
