"""What was prepared once is found again: the same to the last id, and never when anything that decides has changed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toy_tokenizers as toy

from klimb.data import cache, load
from klimb.data.load import load_examples, load_preferences, load_prompts
from klimb.data.render import Renderer
from klimb.data.split import split_by_prompt
from klimb.data.store import occurrences
from klimb.errors import DataError

CHAT, WORDS = Renderer(toy.chatml()), Renderer(toy.words())
USER, REPLY = [{"role": "user", "content": "q"}], [{"role": "assistant", "content": "a"}]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "klimb" / "data"


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


PROMPTS = [{"prompt": "tea ?", "n": n % 3, "deep": {"x": [1.5, None, "é"]}} for n in range(5)]
EXAMPLES = [{"prompt": "tea ?", "completion": c} for c in ("is hot", "hot", "is hot")]
PAIRS = [{"prompt": "tea ?", "chosen": "is hot", "rejected": "very hot", "margin": m} for m in (0.1, 2)]
CHATS = [{"messages": [*USER, *REPLY, *USER, *REPLY]}, {"messages": [*USER, *REPLY]}]
KINDS: list[tuple[Callable[..., Any], Renderer, list[dict[str, Any]]]] = [
    (load_prompts, WORDS, PROMPTS),
    (load_prompts, CHAT, [{"prompt": USER, "answer": "a"}]),
    (load_examples, WORDS, EXAMPLES),
    (load_examples, CHAT, CHATS),
    (load_preferences, WORDS, PAIRS),
]


@pytest.mark.parametrize(("read", "renderer", "rows"), KINDS)
def test_a_miss_and_a_hit_give_what_rows_in_memory_give(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: Callable[..., Any], renderer: Renderer, rows: list[Any]
) -> None:
    monkeypatch.setattr(load, "CHUNK", 2)  # several pieces
    path = write(tmp_path / "rows.jsonl", rows)
    held, miss, hit = read(rows, renderer), read(path, renderer, cache=True), read(path, renderer, cache=True)
    assert list(miss.items) == list(hit.items) == list(held.items)
    assert [kind.report.cache.split(":")[0] for kind in (held, miss, hit)] == ["", "miss, kept", "hit"]
    assert miss.conversational == hit.conversational == held.conversational
    assert {name: hit.report.spread(name) for name in hit.report.lengths} == {
        name: held.report.spread(name) for name in held.report.lengths
    }
    assert hit.report.repeats == held.report.repeats
    assert hit.items[-1] == held.items[-1]
    assert hit.items[:2] == held.items[:2]


def test_what_decides_is_in_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "rows.jsonl", [{**row, "q": "hot ?"} for row in EXAMPLES])

    def found(renderer: Renderer = WORDS, **options: Any) -> str:
        return load_examples(path, renderer, cache=True, **options).report.cache.split(":")[0]

    assert [found(), found()] == ["miss, kept", "hit"]
    for changed in (
        {"renderer": CHAT}, {"renderer": Renderer(toy.words(), system="hot")}, {"max_length": 20},
        {"columns": {"prompt": "q"}}, {"on_bad": "drop"},
    ):  # fmt: skip
        assert [found(**changed), found(**changed)] == ["miss, kept", "hit"], changed  # type: ignore[arg-type]
    chat = write(tmp_path / "chat.jsonl", CHATS)
    renderers = [Renderer(toy.chatml(t)) for t in (toy.CHATML, toy.CHATML.replace("}}\n{{", "}}\n\n{{"))]
    verdicts = [load_examples(chat, renderer, cache=True).report.cache[:3] for renderer in [*renderers, *renderers]]
    assert verdicts == ["mis", "mis", "hit", "hit"]
    monkeypatch.setattr(cache, "_code_version", lambda: ["other"])
    assert found() == "miss, kept"
    write(path, EXAMPLES)
    assert found() == "miss, kept"


def test_the_content_counts_not_the_name(tmp_path: Path) -> None:
    rows = [*EXAMPLES, {"prompt": "tea ?", "completion": ""}]
    load_examples(write(tmp_path / "one.jsonl", rows), WORDS, cache=True, on_bad="drop")
    again = load_examples(write(tmp_path / "two.jsonl", rows), WORDS, cache=True, on_bad="drop")
    assert again.report.cache.startswith("hit")
    assert [str(problem) for problem in again.report.dropped] == [f"{tmp_path}/two.jsonl:4: completion is empty"]
    assert again.report.source == f"{tmp_path}/two.jsonl"


@pytest.mark.parametrize("which", ["*.arrow", "*.json"])
@pytest.mark.parametrize("how", ["cut", "flip", "empty", "gone"])
def test_what_is_broken_is_made_anew(tmp_path: Path, folder: Path, which: str, how: str) -> None:
    path = write(tmp_path / "rows.jsonl", EXAMPLES)
    whole = list(load_examples(path, WORDS, cache=True).items)
    [kept] = folder.glob(which)
    data = kept.read_bytes()
    if how == "gone":
        kept.unlink()
    else:
        at = len(data) // 2
        flipped = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
        kept.write_bytes({"cut": data[:at], "empty": b"", "flip": flipped}[how])
    mended = load_examples(path, WORDS, cache=True)
    assert list(mended.items) == whole
    assert mended.report.cache.startswith("miss")
    assert load_examples(path, WORDS, cache=True).report.cache.startswith("hit")


def test_bad_rows_leave_nothing_behind(tmp_path: Path, folder: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [*EXAMPLES, {"prompt": "tea ?", "completion": ""}])
    for _ in range(2):
        with pytest.raises(DataError, match=r"rows\.jsonl:4: completion is empty"):
            load_examples(path, WORDS, cache=True)
    assert list(folder.iterdir()) == []


def test_a_folder_that_cannot_be_written_costs_the_cache_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    loaded = load_examples(write(tmp_path / "rows.jsonl", EXAMPLES), WORDS, cache=True)
    assert len(loaded.items) == 3
    assert loaded.report.cache.startswith("off, held in memory: ")


def test_what_was_not_used_for_longest_makes_room(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [write(tmp_path / f"{n}.jsonl", [EXAMPLES[n % 2]] * (n // 2 + 1)) for n in range(3)]
    for age, path in zip((300, 200), paths):
        file = load_examples(path, WORDS, cache=True).report.cache.partition(": ")[2]
        os.utime(file, (os.stat(file).st_atime - age,) * 2)
    left_by_a_killed_process = folder / ".tmp-x"
    left_by_a_killed_process.mkdir()
    os.utime(left_by_a_killed_process, (1, 1))
    load_examples(paths[0], WORDS, cache=True)  # a hit: it is young again
    size = sum(file.stat().st_size for file in folder.glob("*.arrow"))
    monkeypatch.setattr(cache, "LIMIT", size + 100)  # two of three
    load_examples(paths[2], WORDS, cache=True)
    hits = [load_examples(path, WORDS, cache=True).report.cache.startswith("hit") for path in (paths[0], paths[2])]
    assert hits == [True, True]
    assert not left_by_a_killed_process.exists()
    monkeypatch.setattr(cache, "LIMIT", 10**9)
    assert load_examples(paths[1], WORDS, cache=True).report.cache.startswith("miss")


def test_splits_of_stored_rows_are_those_of_rows_in_memory(tmp_path: Path) -> None:
    rows = [{"prompt": f"{n} ?", "completion": "a"} for n in range(300)]
    held = load_examples(rows, CHAT).items
    stored = load_examples(write(tmp_path / "rows.jsonl", rows), CHAT, cache=True).items
    for mine, its in zip(split_by_prompt(stored, 0.2, 3), split_by_prompt(held, 0.2, 3)):
        assert list(mine) == list(its)
        assert len(its) > 20


def test_occurrences_are_counted_in_order() -> None:
    assert occurrences(np.array([7, 3, 7, 7, 3], np.uint64)).tolist() == [1, 1, 2, 3, 2]
    assert occurrences(np.zeros(0, np.uint64)).tolist() == []


def test_progress_is_told_with_its_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "CHUNK", 100)
    told: list[tuple[int, float | None]] = []
    path = write(tmp_path / "rows.jsonl", [{"text": f"tea {n} " * 20} for n in range(1000)])
    load_examples(path, CHAT, progress=lambda *at: told.append(at))
    assert [rows for rows, _ in told] == list(range(100, 1001, 100))
    shares = [share for _, share in told[:-1] if share is not None]
    assert len(shares) >= 8
    assert shares == sorted(shares)
    assert 0 < shares[0] < 0.5 < shares[-1] <= 1
