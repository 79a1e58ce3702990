"""Several files as one: how often each row comes, and what it is called."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import toy_tokenizers as toy

from klimb.data.load import load_examples, load_prompts
from klimb.data.render import Renderer
from klimb.data.split import split_by_prompt
from klimb.errors import DataError

CHAT = Renderer(toy.chatml())


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def write(name: str, prompts: list[str]) -> str:
    Path(name).write_text("".join(json.dumps({"prompt": prompt, "answer": name}) + "\n" for prompt in prompts))
    return name


@pytest.mark.parametrize("cache", [False, True])
def test_a_weight_is_how_often_rows_come(cache: bool) -> None:
    a, b = write("a.jsonl", [f"a{n}" for n in range(10)]), write("b.jsonl", [f"b{n}" for n in range(20)])
    loaded = load_prompts({a: 2.5, b: 0.25}, CHAT, cache=cache)
    times = Counter(str(prompt.text) for prompt in loaded.items)
    assert sorted(times.values()) == [1] * 5 + [2] * 5 + [3] * 5
    assert sum(text.startswith("b") for text in times) == 5
    assert len({prompt.id for prompt in loaded.items}) == len(loaded.items) == 30
    assert (loaded.report.rows, loaded.report.used, loaded.report.source) == (30, 30, "a.jsonl + b.jsonl")
    assert [prompt.id for prompt in load_prompts({a: 2.5, b: 0.25}, CHAT).items] == [p.id for p in loaded.items]
    assert "  mixed: 30 rows an epoch\n  2.5 × a.jsonl: 10 rows" in str(loaded.report)
    assert [(part["weight"], part["source"]) for part in loaded.report.facts()["parts"]] == [(2.5, a), (0.25, b)]


def test_a_list_is_all_of_each_in_order() -> None:
    a, b = write("a.jsonl", ["1", "2"]), write("b.jsonl", ["3"])
    assert [prompt.text for prompt in load_prompts([a, Path(b)], CHAT).items] == ["1", "2", "3"]
    alone = load_prompts(a, CHAT).items
    assert [prompt.id for prompt in load_prompts([a], CHAT).items] == [prompt.id for prompt in alone]


def test_what_is_in_two_files_is_a_repeat() -> None:
    for name in ("a.jsonl", "b.jsonl"):
        Path(name).write_text('{"text": "tea"}\n' + json.dumps({"text": name}) + "\n")
    loaded = load_examples(["a.jsonl", "b.jsonl"], CHAT)
    assert loaded.report.repeats == 1
    assert len({item.id for item in loaded.items}) == 4
    assert loaded.items[2].id == f"{loaded.items[0].id}-2"
    train, held_out = split_by_prompt(loaded.items, 0.5, seed=1)
    assert len(train) + len(held_out) == 4
    assert {tuple(x.completion) for x in train}.isdisjoint(tuple(x.completion) for x in held_out)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ({"a.jsonl": 0}, "the weight 0 of 'a.jsonl': a weight is a number above 0"),
        ({"a.jsonl": "much"}, "the weight 'much'"), ({"a.jsonl": float("nan")}, "the weight nan"),
        ({"a.jsonl": True}, "the weight True"), (["a.jsonl", "a.jsonl"], "named twice"),
        (["a.jsonl", "none.jsonl"], "none.jsonl: no such file"),
        (["a.jsonl", "chat.jsonl"], r"chat.jsonl: is prompt \(conversational\), but a.jsonl is prompt \(standard\)"),
    ],
)  # fmt: skip
def test_mixtures_that_are_none(source: Any, reason: str) -> None:
    write("a.jsonl", ["1"])
    Path("chat.jsonl").write_text('{"prompt": [{"role": "user", "content": "q"}]}\n')
    with pytest.raises(DataError, match=reason):
        load_prompts(source, CHAT)
