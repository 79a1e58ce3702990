"""`klimb reward --list`, and the document of the same."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
from world import klimb

from klimb.errors import RewardError
from klimb.rewards.catalogue import NAMES, SOURCES, pages
from klimb.rewards.spec import parse_reward

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_a_page_says_all_there_is_to_say(page):
    assert page.summary.endswith((".", ":"))
    for option in page.options:
        assert option.meaning, f"{page.name} does not say what {option.name} means"
        assert option.type
    if page.name in NAMES:
        known = {option.name for option in page.options}
        refused = {"product": "is no list", "gate": "unknown key", "route": "unknown key"}
        with pytest.raises(RewardError, match=refused.get(page.name, "unknown option 'not_an_option'")) as caught:
            parse_reward({page.name: {"not_an_option": 1}})
        assert not known or any(name in str(caught.value) for name in known)  # list and parser read the same


def test_the_list():
    said, rows = klimb("reward", "--list"), json.loads(klimb("reward", "--list", "--json").out)
    assert said.code == 0
    assert [line for line in said.out.splitlines() if line and not line.startswith(" ")] == [*SOURCES]
    assert [row["name"] for row in rows] == [*SOURCES]
    [column, ignore_case, _] = next(row for row in rows if row["name"] == "exact")["options"]
    assert column == {"name": "column", "type": "text", "default": "answer", "meaning": "column of the references"}
    assert (ignore_case["type"], ignore_case["default"]) == ("true | false", "false")
    cosine = next(row for row in rows if row["name"] == "cosine")
    assert {o["name"]: o["default"] for o in cosine["options"]} == {
        "max_length": None, "of": None, "right": "[1.0, 0.5]", "wrong": "[-1.0, -0.5]", "too_long": "-1.0",
    }  # fmt: skip


def test_one_page():
    said = klimb("reward", "--list", "math")
    assert said.code == 0
    assert said.out.startswith("math\n  1 where the completion's answer equals the reference")
    assert "timeout (number, default 2.0): seconds for one pair" in said.out
    wrong = klimb("reward", "--list", "mth")
    assert (wrong.code, wrong.out) == (1, "")
    assert "unknown reward 'mth'; did you mean 'math'?" in wrong.err


def test_the_document_is_of_today():
    document = runpy.run_path(str(DOCS / "rewards.py"))["document"]()
    assert (DOCS / "REWARDS.md").read_text(encoding="utf-8") == document, "write it anew: python docs/rewards.py"
