"""What the page and the terminal say of a measured reward: its own numbers, whatever is missing, nothing that runs."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from parsed import Page

from klimb.report import write_report
from klimb.report.trust import told


def share(value: float, n: int = 40) -> dict[str, Any]:
    return {"accuracy": value, "accuracy_low": value - 0.1, "accuracy_high": value + 0.05, "n": n}


HOSTILE = "<img src=x onerror=alert(1)>\u202e"
RESULT: dict[str, Any] = {
    "stage": "evaluate_reward", "name": "trust", "method": "ensemble", "seed": 3, "held_out_pairs": 80, **share(0.7125),
    "trust": {
        "pairs": 80,
        "calibration": {"ece": 0.064, "overconfidence": 0.05, "bins": [
            {"confidence": 0.55, **share(0.5)}, {"confidence": 0.95, **share(0.9)},
        ]},
        "by_length": [{"from": -9, "to": -1, **share(0.6)}, {"from": 0, "to": 12, **share(0.8)}],
        "length": {"correlation": 0.31, "partial": 0.22, "given": "label", "of_labels": 0.13},
        "members": {"accuracies": [share(0.69), share(0.68)], "agreement": 0.875, "detects_errors": 0.61},
        "probes": {
            "padded": {"gain": 0.4, "gain_low": 0.3, "gain_high": 0.5, "n": 60, "flagged": True},
            "empty": {"gain": -2.0, "gain_low": -2.5, "gain_high": -1.5, "n": 60, "flagged": False},
        },
        "by": {HOSTILE: share(0.55), "chat": share(0.75)}, "column": "subset", "mean_of_parts": 0.65,
        "drift": {"length": {"then": 10.0, "now": 14.0, "ks": 0.4, "ks_low": 0.3, "ks_high": 0.5, "flagged": True}},
    },
}  # fmt: skip


def page_of(folder: Path, result: dict[str, Any]) -> str:
    (folder / "result.json").write_text(json.dumps(result))
    return write_report(folder).read_text(encoding="utf-8")


def test_the_page_shows_the_numbers(tmp_path: Path) -> None:
    text = page_of(tmp_path, RESULT)
    for shown in (
        "0.713 [0.613, 0.763] of 80 pairs in the right order", "Expected calibration error 0.064",
        "on average it is too sure of itself (0.050)", "Correlation of score and length 0.31",
        "which reply was chosen 0.22", "2 members, alone 0.690, 0.680", "with probability 0.61",
        "from 10.00 to 14.00: Kolmogorov–Smirnov distance 0.40 [0.30, 0.50], more than chance gives", "−9 to −1",
        "mean of the 2 parts 0.650", "padded ⚑", "Reliability",
    ):  # fmt: skip
        assert shown in text, shown
    assert "empty ⚑" not in text


def test_columns_of_a_hostile_file_stay_text(tmp_path: Path) -> None:
    text = page_of(tmp_path, RESULT)
    assert not [element for element in Page(text).elements if element.name == "img"]
    assert "\u202e" not in text
    assert "\u202e" not in told(RESULT)


def test_the_terminal_says_the_same() -> None:
    text = told(RESULT)
    assert "0.713 [0.613, 0.763] of 80 pairs" in text
    padded = next(line for line in text.splitlines() if line.startswith("padded"))
    assert padded.split() == ["padded", "0.400", "0.300", "0.500", "60", "flagged"]
    assert next(line for line in text.splitlines() if line.startswith("−9 to −1")).split()[-4:] == [
        "0.600", "0.500", "0.650", "40",
    ]  # fmt: skip


@pytest.mark.parametrize("key", [*RESULT["trust"], None])
@pytest.mark.parametrize("damage", [None, "text", [3, {"accuracy": "x"}], {"bins": [None], "ece": "x"}])
def test_damaged_pieces_shorten_it(tmp_path: Path, key: str | None, damage: Any) -> None:
    result = copy.deepcopy(RESULT)
    if key is None:
        result["trust"] = damage
    else:
        result["trust"][key] = damage
    assert "What the words mean" in page_of(tmp_path, result)
