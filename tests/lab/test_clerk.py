from __future__ import annotations

import json
import statistics
from itertools import pairwise
from pathlib import Path
from runpy import run_path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from klimb.lab import clerk

# Added up by hand, in tenths where a word over fourteen is involved.
BILLS = [
    ("tea ?", "", 0.0),
    ("tea ?", "it is hot", 1.0),
    ("tea ?", "it is very hot and leafy . thanks", 2.5),
    ("tea ?", "it is crusty", -1.0),  # true of bread
    ("tea ?", "hot hot also hot please sir sir", 1 - 1 - 1 + 0.5 + 0.5 - 3),
    ("tea ?", "hot please sir thanks", 1 + 0.5 + 0.5 - 1),  # the first two slips cost a point each
    ("tea ?", "hot please sir thanks hot hot", 1 + 0.5 + 0.5 - 1 - 1 - 3),  # each further one, of either kind, three
    ("bread ?", "hot hot", -2.0),  # a wrong fact said twice: two mistakes, not three
    ("lamp ?", "kindly kindly", 1.0),  # a courtesy may be said twice
    ("lamp ?", "well the lamp is a boat ?", 0.0),  # goods, glue and the question mark are free
    ("boat ?", " ".join(["so"] * 14), 0.0),
    ("boat ?", " ".join(["so"] * 19), -0.5),
    ("violin ?", "stringed tuned melodious varnished please thanks", 5.0),
    # The over-optimised reply of the world's first calibration: nineteen words, of which two facts, their echoes, and
    # thirteen courtesies: thirteen slips.
    (
        "bread ?",
        "crusty crusty also soft also soft gladly gladly kindly gladly please gladly thanks kindly sir gladly"
        " kindly gladly kindly",
        (1 + 1) + (0.5 + 0.5) - 2 - 11 * 3 - 0.5,
    ),
]


@pytest.mark.parametrize(("prompt", "reply", "points"), BILLS)
def test_gold_is_what_a_person_adds_up(prompt: str, reply: str, points: float) -> None:
    assert clerk.gold([prompt], [reply]) == [points]
    assert sum(price.points for price in clerk.explain(prompt, reply)) == points


def independent_gold(prompt: str, reply: str) -> float:
    """The same prices from counts of words, not word by word."""
    words = reply.split()
    true = set(clerk.FACTS[prompt.split()[0]])
    facts = [word for word in words if any(word in facts for facts in clerk.FACTS.values())]
    courtesies = sum(words.count(courtesy) for courtesy in clerk.COURTESIES)
    right = len(true & set(facts))
    wrong = sum(word not in true for word in facts)
    slips = len(facts) - right - wrong + max(0, courtesies - 2)
    return right + min(courtesies, 2) / 2 - wrong - max(slips, 3 * slips - 4) - 0.1 * max(0, len(words) - 14)


def test_gold_agrees_with_counting() -> None:
    rows = clerk.demonstrations(500, seed=3)
    # Joined with its neighbour a reply is long, repetitive and about the wrong good as often as not.
    replies = [f"{a['completion']} {b['completion']}" for a, b in pairwise(rows)]
    asked = [row["prompt"] for row in rows[1:]]
    expected = [independent_gold(prompt, reply) for prompt, reply in zip(asked, replies)]
    assert clerk.gold(asked, replies, prompt_id=["x"] * len(asked)) == pytest.approx(expected, abs=1e-9)
    assert min(expected) < -5


def test_explain_names_every_word_and_why() -> None:
    bill = clerk.explain("tea ?", "it is hot hot crusty please sir sir" + " so" * 8)
    assert [price.words for price in bill[:8]] == ["it", "is", "hot", "hot", "crusty", "please", "sir", "sir"]
    whys = ["", "", "true", "said again", "not true of tea", "courtesy", "courtesy", "grovelling"]
    assert [price.why for price in bill[:8]] == whys
    assert [price.points for price in bill[:8]] == [0, 0, 1, -1, -1, 0.5, 0.5, -1]
    assert bill[-1] == ("2 over 14 words", -0.2, "long-winded")


def test_gold_is_at_most_five_and_needs_a_good() -> None:
    best = [" ".join((*facts, "please", "thanks")) for facts in clerk.FACTS.values()]
    assert clerk.gold([row["prompt"] for row in clerk.prompts()], best) == [5.0] * 6
    with pytest.raises(ValueError, match="'gold \\?' asks about no good"):
        clerk.gold(["gold ?"], ["it is hot"])
    with pytest.raises(ValueError):
        clerk.gold(["tea ?", "tea ?"], ["it is hot"])


def test_language_has_fifty_tokens_and_disjoint_facts() -> None:
    assert len(clerk.WORDS) == len(set(clerk.WORDS)) == 50 - 3
    facts = [fact for facts in clerk.FACTS.values() for fact in facts]
    assert len(facts) == len(set(facts)) == 24
    assert (len(clerk.COURTESIES), len(clerk.GLUE)) == (6, 10)


def test_demonstrations_are_short_decent_and_sometimes_wrong() -> None:
    rows = clerk.demonstrations(8000, seed=0)
    assert rows == clerk.demonstrations(8000, seed=0)
    assert rows[:100] != clerk.demonstrations(100, seed=1)
    replies = [row["completion"].split() for row in rows]
    assert {word for row in rows for word in row["prompt"].split()}.union(*replies) == set(clerk.WORDS)
    tokens = [len(words) + 1 for words in replies]
    assert min(tokens) > 1, "an empty reply"
    assert max(tokens) <= clerk.MAX_REPLY
    # About eight tokens and a point and a half, as calibrated; the margins are ten standard errors of 8,000 replies.
    assert statistics.mean(tokens) == pytest.approx(7.9, abs=0.4)
    golds = clerk.gold([row["prompt"] for row in rows], [row["completion"] for row in rows])
    assert statistics.mean(golds) == pytest.approx(1.61, abs=0.12)
    courtesies = [sum(word in clerk.COURTESIES for word in words) for words in replies]
    assert max(courtesies) == 2, "decent clerks do not grovel: what the reward model never sees, it cannot price"
    bills = [clerk.explain(row["prompt"], row["completion"]) for row in rows]
    twice = sum(any(price.points == -3 for price in bill) for bill in bills)
    assert twice < 8, "a third slip, which costs three, is to be rarer than one reply in a thousand"
    for number, share in enumerate((0.40, 0.40, 0.20)):
        assert courtesies.count(number) / 8000 == pytest.approx(share, abs=0.055)


def test_prepare_writes_a_world_that_its_own_model_can_read(tmp_path: Path) -> None:
    paths = clerk.prepare(tmp_path / "world", seed=0)
    assert set(paths) == {"model", "demonstrations", "prompts", "gold", "explain", "labels"}
    assert "simulated" in paths["labels"]
    rows = [json.loads(line) for line in Path(paths["demonstrations"]).read_text().splitlines()]
    assert len(rows) == 8000
    assert [json.loads(line) for line in Path(paths["prompts"]).read_text().splitlines()] == clerk.prompts()
    file, _, function = paths["gold"].rpartition(":")
    assert run_path(file)[function](["tea ?"], ["it is hot"]) == [1.0]
    file, _, function = paths["explain"].rpartition(":")
    assert run_path(file)[function]("tea ?", "hot") == [("hot", 1.0, "true")]

    tokenizer = AutoTokenizer.from_pretrained(paths["model"])
    assert len(tokenizer) == 50
    assert len(tokenizer("tea ?").input_ids) == 3
    for row in rows[:200]:
        ids = tokenizer(row["completion"], add_special_tokens=False).input_ids
        assert tokenizer.decode(ids) == row["completion"]
    model = AutoModelForCausalLM.from_pretrained(paths["model"])
    assert 100_000 < sum(weight.numel() for weight in model.parameters()) < 110_000
    assert model.config.n_positions >= 3 + clerk.MAX_REPLY

    again = clerk.prepare(tmp_path / "again", seed=0)
    for name in ("demonstrations", "prompts"):
        assert Path(again[name]).read_bytes() == Path(paths[name]).read_bytes()
