"""The arena: equal terms, figures that are what they are called, a second call that goes on, and what the page says."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from klimb.lab.countdown import questions, solved
from klimb.stages.pipeline import check_recipe

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import arena
import arena_page
import arena_rewards


@pytest.mark.parametrize("contest", arena.contests())
def test_every_method_is_read_without_a_complaint_and_draws_as_much(contest: str) -> None:
    world = arena.contests()[contest]
    for method, settings in arena.methods(contest).items():
        stages = world.stages(method, settings)
        check_recipe("arena", {"name": "arena", "world": world.name, "threads": 1, "stages": stages})
        trained = stages[[*stages][-2]]
        if contest == "offline":
            continue
        drawn = trained["steps"] * trained["prompts_per_step"] * trained.get("samples_per_prompt", 2)
        assert drawn == world.train["max_samples"] == trained.get("max_samples", drawn), method
        updates = trained["steps"] * trained.get("updates_per_step", 1)
        assert updates == world.train["steps"], method


TINY: dict[str, dict[str, Any]] = {
    "sft": {"steps": 2, "batch_size": 8},
    "rl": {"steps": 2, "prompts_per_step": 4, "samples_per_prompt": 2, "max_samples": 16},
    "online_preference": {"steps": 2, "prompts_per_step": 4},
    "evaluate": {"measure": {"samples_per_prompt": 16, "max_tokens": 8}},
}


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Mini-countdown with four methods, two steps each, asked sixteen questions."""
    prompts = tmp_path / "few.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": asked.prompt}) + "\n" for asked in [*questions()][:16]))
    stages, methods = arena.Contest.stages, arena.methods

    def small(self: arena.Contest, method: str, settings: dict[str, Any]) -> dict[str, Any]:
        made = {name: {**stage, **TINY[stage["stage"]]} for name, stage in stages(self, method, settings).items()}
        for stage in made.values():
            if stage["stage"] == "evaluate":
                stage["measure"] |= {"data": str(prompts), "reward": "${world.reward}", "gold": "${world.reward}"}
        return made

    chosen = ("grpo", "grpo, clip-higher", "dro", "online_dpo")
    monkeypatch.setattr(arena.Contest, "stages", small)
    monkeypatch.setattr(arena, "methods", lambda contest: {name: methods(contest)[name] for name in chosen})
    # Two steps of a start that knows nothing are all zeros: any reward will do that tells completions apart.
    rewards = tmp_path / "rewards.py"
    rewards.write_text("def size(completions):\n    return [float(len(text)) for text in completions]\n")
    monkeypatch.setitem(TINY, "rl", {**TINY["rl"], "reward": f"{rewards}:size"})
    monkeypatch.setitem(TINY, "online_preference", {**TINY["online_preference"], "reward": f"{rewards}:size"})
    return tmp_path


@pytest.mark.slow
def test_a_tiny_arena_has_its_figures_and_goes_on_where_it_was_stopped(tiny: Path) -> None:
    def play(until: float) -> dict[str, dict[str, Any]]:
        return {row["method"]: row for row in arena.rows_of("countdown", 0, tiny / "runs", None, until)}

    assert play(time.time() - 1) == {}
    first = play(time.time() + 600)
    assert [*first][:2] == ["sft", "grpo"]
    assert not [row for row in first.values() if "error" in row]
    assert first["sft"]["kl"] == 0 < first["grpo"]["kl"]
    for method in ("grpo", "grpo, clip-higher", "online_dpo"):
        assert first[method]["drawn"] == 16, method
        assert 0 <= first[method]["pass@1"] <= first[method]["pass@16"] <= 1
        assert 1 <= first[method]["length"] <= 8
        assert first[method]["seconds"] > 0
    assert first["grpo"]["entropy"] > 0
    assert first["sft"]["entropy"] is None  # nobody measured it
    assert first["online_dpo"]["chosen_log_ratio"] is not None
    assert first["grpo, clip-higher"]["weights"] == first["grpo"]["weights"] != first["sft"]["weights"]
    assert first["online_dpo"]["weights"] != first["grpo"]["weights"]
    assert play(time.time() + 600) == first  # the seconds, too: nothing was run again


def test_a_method_that_fails_is_named_and_the_others_go_on(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = {"grpo": {"algorithm": "grpoo"}, "rloo": {"algorithm": {"name": "rloo", "kl": "none"}}}
    monkeypatch.setattr(arena, "methods", lambda contest: bad)
    rows = arena.rows_of("countdown", 0, tiny / "runs", None, time.time() + 600)
    assert [(row["method"], row.get("error")) for row in rows] == [
        ("sft", None), ("grpo", "ConfigError"), ("rloo", None),
    ]  # fmt: skip


def test_results_are_kept_contest_by_contest(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(arena, "RESULTS", tmp_path / "arena.json")
    row = {"contest": "digits", "seed": 0, "method": "grpo", "pass@1": 0.5}
    arena.keep([row, {**row, "method": "of old"}])
    arena.keep([{**row, "contest": "clerk"}])
    kept = arena.keep([{**row, "pass@1": 0.6}])
    assert kept == json.loads(arena.RESULTS.read_text())["rows"]
    assert [(row["contest"], row["pass@1"]) for row in kept] == [("digits", 0.6), ("clerk", 0.5)]


def test_every_seed_has_an_order_of_its_own_behind_the_base() -> None:
    entrants: dict[str, dict[str, Any]] = {name: {} for name in "abcdefgh"}
    orders = [[name for name, _ in arena.in_order(entrants, "c", seed)] for seed in (0, 1, 0)]
    assert orders[0] == orders[2] != orders[1]
    assert all(order[:2] == ["sft", "c"] and sorted(order[1:]) == sorted(entrants) for order in orders)


def test_shuffled_rewards_are_as_many_and_depend_on_the_completions_alone() -> None:
    asked = [*questions().items()][:40]
    prompts = [question.prompt for question, _ in asked]
    completions = [answers[0] if i % 2 else "1" for i, (_, answers) in enumerate(asked)]
    dealt = arena_rewards.shuffled(prompts, completions)
    assert sum(dealt) == sum(solved(prompts, completions)) == 20
    assert dealt != solved(prompts, completions)
    assert dealt == arena_rewards.shuffled(prompts, completions) != arena_rewards.shuffled(prompts, completions[::-1])


def rows_of(method: str, scores: list[float], **more: Any) -> list[dict[str, Any]]:
    return [
        {"contest": "countdown", "seed": seed, "method": method, "pass@1": score, "weights": f"{method}{seed}"} | more
        for seed, score in enumerate(scores)
    ]


def test_the_page_compares_seed_by_seed() -> None:
    """The seeds differ by 0.2, so that all intervals overlap; `better` is 0.05 above grpo on each of them."""
    ran = {
        "sft": rows_of("sft", [0.1, 0.2, 0.3]),
        "grpo": rows_of("grpo", [0.3, 0.4, 0.5], weights="same"),
        "better": rows_of("better", [0.35, 0.451, 0.549]),
        "worse": rows_of("worse", [0.25, 0.351, 0.449]),
        "alike": rows_of("alike", [0.33, 0.38, 0.51]),
        "grpo, clip-higher": rows_of("grpo, clip-higher", [0.3, 0.4, 0.5], weights="same"),
        "once": rows_of("once", [0.9]),
    }
    told = arena_page.verdict(ran, "grpo")
    assert "Of 3 methods compared with grpo" in told
    assert "1 are above it (better);" in told
    assert "1 are below it (worse);" in told
    assert "for 1 **no difference is shown** (alike)." in told
    assert "To the bit the weights of grpo (grpo, clip-higher)." in told
    assert "fewer than two seeds have both (once)." in told
    failed = [{"contest": "countdown", "seed": 0, "method": "broken", "error": "RewardError"}]
    page = arena_page.section("countdown", [*failed, *(row for rows in ran.values() for row in rows)])
    assert "Did not run: broken (RewardError)." in page
    assert "| grpo, clip-higher | grpo | +0.000 [+0.000, +0.000] | the same weights | the same weights |" in page
    assert page.index("| once |") < page.index("| better |") < page.index("| sft |")
    assert "| better | **0.450** [" in page


def test_the_picture_and_the_page_are_written_between_the_marks(tmp_path: Path) -> None:
    (tmp_path / "ARENA.md").write_text("# head\n\n<!-- tables -->outdated<!-- tables -->\n\ntail\n")
    rows = rows_of("grpo", [0.3, 0.4]) + rows_of("sft", [0.1, 0.2]) + rows_of("dpo", [1.0, 1.2], contest="offline")
    for _ in range(2):
        arena_page.write(rows, tmp_path)
        page = (tmp_path / "ARENA.md").read_text()
        assert page.startswith("# head\n\n<!-- tables -->")
        assert page.endswith("<!-- tables -->\n\ntail\n")
        assert "outdated" not in page
        assert page.count("### Mini-countdown") == page.count("### The clerk, from comparisons alone") == 1
        assert "| method | gold | − dpo |" in page
    assert (tmp_path / "arena.svg").read_text().startswith("<svg xmlns=")
