"""`klimb algorithms`: the lists, a page for every row, and the document of all of them."""

from __future__ import annotations

import json
import runpy
from dataclasses import replace
from pathlib import Path

import pytest
from world import klimb

from klimb.commands.algorithms import RULE_OF_THUMB, online_page, page, said_by, text_of
from klimb.objective import ALGORITHMS, GRPO, KL, PPO, PREFERENCE_LOSSES, k1

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("name", [*ALGORITHMS, *PREFERENCE_LOSSES])
def test_a_page_says_all_there_is_to_say(name):
    found = page(name)
    for key in ("formula", "source", "models", "takes", "fails", "degrades"):
        assert found[key], f"{name} does not say its {key}: write it into the docstring of the value that decides it"
    text = text_of(found)
    assert text.startswith(f"{name}: ")
    assert " at 0x" not in text
    assert max(len(line) for line in text.splitlines()[1:]) <= 110
    json.dumps(found)


def test_the_page_of_grpo():
    found = page("grpo")
    assert found["formula"]["advantage"].startswith("A = (R − mean) / (std + eps)")
    assert found["formula"]["kl"] == "β · (e^(−x) − 1 + x) with x = log π/π_ref"
    assert found["defaults"] == {
        "advantage.group_zscore.eps": 1e-4,
        "surrogate.clip.low": 0.2,
        "surrogate.clip.high": 0.2,
        "kl.beta": 0.04,
    }
    assert [model.split(",")[0] for model in found["models"]] == ["policy", "reference"]
    assert found["takes"] == ["prompts and a reward", "samples_per_prompt of 2 or more"]
    assert found["source"] == GRPO.source


def test_what_is_held_and_needed_follows_the_row():
    assert [model.split(",")[0] for model in page("ppo")["models"]] == ["policy", "reference", "critic"]
    assert [model.split(",")[0] for model in page("dapo")["models"]] == ["policy"]
    assert page("ppo")["takes"] == ["prompts and a reward"]
    assert "only until its log-probs are kept" in page("dpo")["models"][1]
    assert [model.split(",")[0] for model in page("simpo")["models"]] == ["policy"]
    assert "updates_per_step of 1" in page("rloo")["takes"]
    mine = online_page(replace(PPO, name="mine", kl=KL("reward", k1, 0.0), entropy_bonus=0.01))
    assert [model.split(",")[0] for model in mine["models"]] == ["policy", "critic"]
    assert mine["takes"][-1] == "the policy's entropy at each token"


def test_the_page_of_a_loss():
    found = page("cdpo")
    assert found["defaults"] == {"beta": 0.1, "epsilon": 0.1}
    assert found["first_loss"] == pytest.approx(0.6931, abs=1e-4)
    assert found["takes"] == ["pairs: prompt, chosen, rejected"]
    assert "While π = π_ref the loss is 0.6931." in text_of(found)


def test_what_a_docstring_says():
    def mine(rewards):
        """A = R − 1 (Dr. GRPO, arXiv 2503.20783, eq. 3). A note on it.

        Fails when R is never 1, e.g. always. Degrades
        slowly. Another note.
        """

    said = said_by(mine)
    assert said.formula == "A = R − 1 (Dr. GRPO, arXiv 2503.20783, eq. 3)."
    assert (said.fails, said.degrades) == ("when R is never 1, e.g. always.", "slowly.")
    assert said.notes == "A note on it. Another note."


def test_the_lists(tmp_path, monkeypatch):
    online, offline = klimb("algorithms"), klimb("algorithms", "--offline")
    for said, known in ((online, ALGORITHMS), (offline, PREFERENCE_LOSSES)):
        lines = said.out.splitlines()
        assert said.code == 0
        assert [line.split()[0] for line in lines[1 : len(known) + 1]] == [*known]
        assert tuple(lines[-3:]) == RULE_OF_THUMB
    for arguments, known in ((["--json"], ALGORITHMS), (["--offline", "--json"], PREFERENCE_LOSSES)):
        rows = json.loads(klimb("algorithms", *arguments).out)
        assert [row["name"] for row in rows] == [*known]
        assert all(row["source"] for row in rows)


def test_a_page_at_the_command_line(tmp_path):
    assert json.loads(klimb("algorithms", "dpo", "--json").out)["kind"] == "offline"
    assert klimb("algorithms", "grpo").out.startswith("grpo: arXiv 2402.03300")
    said = klimb("algorithms", "gpro")
    assert (said.code, said.out) == (1, "")
    assert "'gpro', did you mean 'grpo'?" in said.err
    file = tmp_path / "mine.py"
    file.write_text(
        "from klimb.objective import GRPO\nfrom dataclasses import replace\nMINE = replace(GRPO, name='m')\n"
    )
    assert klimb("algorithms", f"{file}:MINE").out.startswith("m: arXiv")


def test_the_document_is_of_today():
    document = runpy.run_path(str(DOCS / "algorithms.py"))["document"]()
    assert (DOCS / "ALGORITHMS.md").read_text(encoding="utf-8") == document, "write it anew: python docs/algorithms.py"
