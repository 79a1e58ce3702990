"""`klimb check DATA`: what it says is what the file holds, and its exit code what training would say to it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import toy_tokenizers as toy
from world import World, klimb, write

from klimb.commands.check_text import Stretch, in_colour, shown
from klimb.data import cache
from klimb.lab.scratch import make_model


def looked(*words: str) -> tuple[int, dict[str, Any]]:
    said = klimb("check", *words, "--json")
    return said.code, json.loads(said.out)


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return model_of(tmp_path_factory.mktemp("chat") / "model", toy.chatml(toy.QWEN3))


def model_of(folder: Path, tokenizer: Any) -> str:
    return str(make_model(folder, tokenizer=tokenizer, architecture="qwen3", hidden=16, layers=1, heads=2, mlp=32,
                          context=64, seed=0))  # fmt: skip


# Rows -----------------------------------------------------------------------------------------------------------------

BAD = """{"prompt": "a ?", "completion": "b"}
{"prompt": "a ?", "completion" "b"}

{"prompt": "a ?", "completion": null}
{"prompt": "a ?", "completion": "b"}
[1, 2]
{"prompt": "b ?", "completion": "c so"}
"""


@pytest.mark.parametrize("model", [True, False])
def test_every_bad_row_is_named_with_line_and_reason(model: bool, world: World, here: Path) -> None:
    Path("bad.jsonl").write_text(BAD)
    words = ["bad.jsonl", *([f"model={world.model}"] if model else [])]
    code, found = looked(*words)
    assert code == 1
    assert (found["rows"], found["used"], found["repeats"], found["prompts"]) == (6, 3, 1, 2)
    assert found["type"] == "prompt-completion (standard)"
    assert [where for where, _ in found["bad"]["first"]] == ["bad.jsonl:2", "bad.jsonl:4", "bad.jsonl:6"]
    reasons = [reason for _, reason in found["bad"]["first"]]
    assert reasons[1:] == ["completion is null", "is a list, not an object of columns"]
    assert sum(found["bad"]["reasons"].values()) == 3
    said = klimb("check", *words)
    assert "bad.jsonl:4: completion is null" in said.out
    assert said.out.splitlines()[-1] == (
        "not fit to train on: 3 bad rows stop a run; mend them, or set on_bad=drop"
    )  # fmt: skip
    dropped = klimb("check", *words, "on_bad=drop")
    assert (dropped.code, dropped.out.splitlines()[-1]) == (0, "fit to train on, 3 rows left out")
    assert sorted(path.name for path in here.iterdir()) == ["bad.jsonl"]


def test_many_bad_rows_go_to_a_file(here: Path) -> None:
    write(here / "many.jsonl", [{"prompt": "a ?", "completion": "b" * (row % 3)} for row in range(99)])
    said = klimb("check", "many.jsonl")
    assert said.code == 1
    assert "33: 33 × completion is empty" in said.out
    assert "and 13 more; all of them are in bad-rows-many.jsonl.txt" in said.out
    listed = (here / "bad-rows-many.jsonl.txt").read_text().splitlines()
    assert listed == [f"many.jsonl:{row + 1}: completion is empty" for row in range(0, 99, 3)]


def test_rows_of_which_none_can_be_used(here: Path) -> None:
    write(here / "other.jsonl", [{"question": "a ?", "answer": "b"}] * 3)
    said = klimb("check", "other.jsonl")
    assert said.code == 1
    assert "rename them, as in columns={prompt: question, completion: answer}" in said.out
    assert said.out.splitlines()[-1] == "not fit to train on: no row can be used"
    code, found = looked("other.jsonl", "columns.prompt=question", "columns.completion=answer")
    assert (code, found["type"], found["repeats"]) == (0, "prompt-completion (standard)", 2)


# Lengths and balance --------------------------------------------------------------------------------------------------


def test_lengths_are_in_tokens_and_limits_are_counted(world: World, here: Path) -> None:
    """A word is a token, BOS goes before the prompt and EOS behind the completion; the model takes 24."""
    write(here / "long.jsonl", [{"prompt": "a ?", "completion": " ".join("b" * n)} for n in range(1, 21)])
    code, found = looked("long.jsonl", f"model={world.model}")
    assert found["lengths"]["unit"] == "tokens"
    assert found["lengths"]["completion"] == {"least": 2, "5 %": 3, "half": 12, "95 %": 20, "99 %": 21, "most": 21}
    assert found["lengths"]["prompt"]["most"] == 3
    assert (code, found["over"]) == (0, {"rows": {"rows": 0, "at_most": 24}})
    code, found = looked("long.jsonl", f"model={world.model}", "max_tokens=22", "max_prompt_tokens=2")
    assert (code, found["over"]) == (1, {"rows": {"rows": 2, "at_most": 22}, "prompts": {"rows": 20, "at_most": 2}})
    assert ["long.jsonl:19", "the row has 23 tokens, where at most 22 fit"] in found["bad"]["first"] + [
        line.split(": ", 1) for line in (here / "bad-rows-long.jsonl.txt").read_text().splitlines()
    ]


def test_the_limit_is_that_of_training(world: World, here: Path) -> None:
    """What the check says of a row is what a run says."""
    write(here / "long.jsonl", [{"prompt": "a ?", "completion": " ".join("b" * n)} for n in (3, 30)])
    _, found = looked("long.jsonl", f"model={world.model}")
    refused = klimb("sft", f"model={world.model}", "data=long.jsonl", "--json")
    [[where, reason]] = found["bad"]["first"]
    assert f"{where}: {reason}" in refused.err


@pytest.mark.parametrize(
    ("rows", "kind", "balance"),
    [
        ([{"prompt": "a ?", "chosen": "b " * n, "rejected": "c c"} for n in (1, 2, 3, 4)],
         "preference", {"chosen is longer": 0.5, "both are as long": 0.25, "both are the same": 0.0}),
        ([{"prompt": "a ?", "completion": "b", "label": n > 0} for n in range(4)], "labelled",
         {"labels are true": 0.75}),
        ([{"prompt": "a ?", "completions": ["b", "c"], "labels": [True, n > 0]} for n in range(4)],
         "steps", {"labels are true": 0.875}),
        ([{"prompt": "a ?", "completions": ["b", "c"], "ranks": [1, 2 + n]} for n in range(4)], "ranking", {}),
    ],
)  # fmt: skip
def test_what_a_learner_could_live_on(
    rows: list[dict[str, Any]], kind: str, balance: dict[str, float], world: World, here: Path
) -> None:
    write(here / "data.jsonl", rows)
    code, found = looked("data.jsonl", f"model={world.model}")
    assert (code, found["type"], found["balance"]) == (0, f"{kind} (standard)", balance)
    _, alone = looked("data.jsonl")
    assert alone["lengths"]["unit"] == "characters"
    if kind != "preference":
        assert alone["balance"] == balance


def test_equal_sides_are_counted(world: World, here: Path) -> None:
    write(here / "data.jsonl", [{"prompt": "a ?", "chosen": "b", "rejected": side} for side in ("b", "c", "c so", "b")])
    code, found = looked("data.jsonl", f"model={world.model}")
    assert (code, found["used"], found["balance"]["both are the same"]) == (1, 2, 0.5)


def test_what_was_looked_at_once_is_found_again(world: World, here: Path) -> None:
    Path("bad.jsonl").write_text(BAD + '{"prompt": "f ?", "completion": "so"}\n')
    first, again = (looked("bad.jsonl", f"model={world.model}", "on_bad=drop")[1] for _ in range(2))
    assert first.pop("cache").startswith("miss")
    assert again.pop("cache").startswith("hit")
    assert first == again
    words = ["check", "bad.jsonl", f"model={world.model}", "on_bad=drop"]
    code = "import sys, klimb.cli\ntry: klimb.cli.main()\nfinally: assert 'torch' not in sys.modules"
    anew = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert (anew.returncode, anew.stderr) == (0, "")
    assert anew.stdout == klimb(*words).out


def test_what_was_found_holds_for_the_same_rows_model_and_options_only(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(here / "cache"))
    model = Path(model_of(here / "model", toy.chatml(toy.QWEN3)))
    turns = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "a ?"}]
    write(here / "data.jsonl", [{"prompt": turns, "completion": [{"role": "assistant", "content": "b"}]}])
    words = ["data.jsonl", f"model={model}"]
    first = looked(*words)[1]
    [kept] = cache.folder().with_name("checks").iterdir()
    assert looked(*words)[1] == {**first, "cache": first["cache"].replace("miss, kept", "hit")}
    assert looked(*words, "max_tokens=3")[0] == 1
    (model / "chat_template.jinja").write_text(toy.CHATML)
    assert looked(*words)[1]["template"] != first["template"]
    write(here / "data.jsonl", [{"prompt": "a ?", "completion": "b"}])
    assert looked(*words)[1]["type"] == "prompt-completion (standard)"
    assert len([*kept.parent.iterdir()]) == 4


@pytest.mark.parametrize("content", ["", "[]", '{"facts": {}, "problems": [], "rows": "/nowhere"}'])
def test_what_was_kept_and_is_damaged_is_looked_at_anew(content: str, world: World, here: Path) -> None:
    write(here / "data.jsonl", [{"prompt": "a ?", "completion": "b"}])
    first = looked("data.jsonl", f"model={world.model}")[1]
    for kept in cache.folder().with_name("checks").iterdir():
        kept.write_text(content)
    assert looked("data.jsonl", f"model={world.model}")[1] == {
        **first,
        "cache": first["cache"].replace("miss, kept", "hit"),
    }


# Text -----------------------------------------------------------------------------------------------------------------


def test_what_is_trained_on_is_marked_and_nothing_reaches_the_terminal(chat_model: str, here: Path) -> None:
    question, answer = "Red \x1b[31m or ‮blue?", "Blue."
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    write(here / "chat.jsonl", [{"messages": messages}])
    said = klimb("check", "chat.jsonl", f"model={chat_model}")
    assert said.code == 0
    assert "⟦<think>\n  \n  </think>\n  \n  Blue.<|im_end|>⟧" in said.out
    assert "Red ␛[31m or ⟨U+202E⟩blue?<|im_end|>\n" in said.out
    assert "\x1b" not in said.out
    [example] = json.loads(klimb("check", "chat.jsonl", f"model={chat_model}", "--json").out)["examples"]
    assert "".join(text for text, _ in example["text"]).endswith("Blue.<|im_end|>")
    assert [trained for _, trained in example["text"]] == [False, True]


def test_colour_is_for_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    stretches = [Stretch("a ", False), Stretch("b\x1b]0;", True)]
    assert shown(stretches, False) == "a ⟦b␛]0;⟧"
    assert shown(stretches, True) == "a \x1b[32mb␛]0;\x1b[0m"
    assert not in_colour()
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert in_colour()
    monkeypatch.setenv("NO_COLOR", "1")
    assert not in_colour()


DROPS_SYSTEM = toy.CHATML.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'system' %}")


@pytest.mark.parametrize(
    ("template", "system", "last", "earlier"),
    [
        (toy.CHATML, "kept", "kept", "kept"),
        (toy.QWEN3, "kept", "kept", "dropped"),
        (DROPS_SYSTEM, "dropped", "kept", "kept"),
        (toy.CHATML.replace("{% for", "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}"
                            "{% endif %}{% for", 1), "refused", "kept", "kept"),
    ],
    ids=["kept", "thoughts dropped", "system dropped", "system refused"],
)  # fmt: skip
def test_what_a_template_does_to_turns(template: str, system: str, last: str, earlier: str, here: Path) -> None:
    model = model_of(here / "model", toy.chatml(template))
    write(here / "data.jsonl", [{"prompt": [{"role": "user", "content": "Hello"}]}])
    told = looked("data.jsonl", f"model={model}")[1]["template"]
    assert told["system turn"].split(":")[0] == system
    assert told["<think> in the last answer"] == last
    assert told["<think> in an earlier answer"] == earlier
    assert told["end of the assistant's turn"] == "'<|im_end|>'"
    if system == "refused":
        assert "no system" in told["system turn"]


def test_begin_and_end(here: Path) -> None:
    """Llama 3's tokenizer and its template both write BOS; training has one."""
    model = model_of(here / "model", toy.llama3())
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "I am well."}]
    write(here / "data.jsonl", [{"messages": turns}] * 3)
    found = looked("data.jsonl", f"model={model}")[1]["ends"]
    assert found == {"rows": 3, "begin with BOS": 3, "begin with two": 0, "end with a stop token": 3, "end with two": 0}
    twice = toy.LLAMA3.replace("{{ bos_token }}", "{{ bos_token }}{{ bos_token }}")
    model = model_of(here / "twice", toy.llama3(twice))
    code, found = looked("data.jsonl", f"model={model}")
    assert code == 1
    assert list(found["bad"]["reasons"]) == ["the prompt starts with two BOS tokens; let the chat template write one"]


def test_without_a_model_it_says_what_it_did_not_look_at(here: Path) -> None:
    write(here / "hh.jsonl", [{"chosen": "\n\nHuman: a\n\nAssistant: b c", "rejected": "\n\nHuman: a\n\nAssistant: d"}])
    said = klimb("check", "hh.jsonl")
    assert said.code == 0
    assert "transcripts=chat" in said.out
    assert "not looked at" in said.out
    assert "add model=DIR" in said.out
    chat = klimb("check", "hh.jsonl", "transcripts=chat")
    assert "preference (conversational)" in chat.out
    assert "transcripts=chat" not in chat.out


def test_what_is_no_data(here: Path) -> None:
    for words, names in (
        (["missing.jsonl"], "missing.jsonl: no such file"),
        (["quikstart"], "did you mean 'quickstart'?"),
        (["missing.yaml"], "missing.yaml: no such file"),
        ([], "klimb check DATA"),
        (["data.jsonl", "modle=x"], "did you mean 'model'?"),
    ):
        said = klimb("check", *words)
        assert (said.code, said.out, said.err.count("\n")) == (1, "", 1), words
        assert names in said.err
    (here / "empty.jsonl").touch()
    assert klimb("check", "empty.jsonl").err == "klimb: empty.jsonl: no rows; give it at least one\n"


def test_a_row_of_another_type_is_one_bad_row(here: Path) -> None:
    write(here / "mixed.jsonl", [{"prompt": "a ?"}, {"text": "b"}])
    said = klimb("check", "mixed.jsonl")
    assert said.code == 1
    assert "mixed.jsonl:2: has no column prompt (it has: text), where most rows are prompt" in said.out
    assert "not fit to train on: 1 bad rows" in said.out
