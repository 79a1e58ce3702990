"""Talking to a model: in the form that it was trained on, one reply from a pipe, and a conversation in a terminal."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import signal
import sys
from pathlib import Path

import pytest
from chats import chat_model, taught
from toy_tokenizers import chatml
from transformers import AutoModelForCausalLM, AutoTokenizer
from world import Played, Said, World, klimb, play, write

from klimb.commands.chat import ChatConfig, Speaker
from klimb.errors import DataError
from klimb.lab.scratch import character_tokenizer, make_model

GREEDY = ChatConfig(temperature=0.0, threads=1)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Played:
    return taught(tmp_path_factory.mktemp("taught"))


def piped(text: str, *arguments: str, monkeypatch: pytest.MonkeyPatch) -> Said:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    return klimb("chat", *arguments, "threads=1")


# One prompt from standard input -------------------------------------------------------------------------------------


def test_a_pipe_gets_the_reply_alone(run: Played, monkeypatch: pytest.MonkeyPatch) -> None:
    said = piped("a ?\n", str(run.path), "temperature=0", monkeypatch=monkeypatch)
    assert (said.code, said.out) == (0, "it is a\n")


def test_the_reply_is_that_of_transformers(run: Played, monkeypatch: pytest.MonkeyPatch) -> None:
    said = piped("e ?", run.model, "temperature=0", "--json", monkeypatch=monkeypatch)
    [reply] = json.loads(said.out)
    tokenizer = AutoTokenizer.from_pretrained(run.model)
    model = AutoModelForCausalLM.from_pretrained(run.model).eval()
    inputs = tokenizer.apply_chat_template([{"role": "user", "content": "e ?"}], add_generation_prompt=True,
                                           return_tensors="pt", return_dict=True)  # fmt: skip
    theirs = model.generate(**inputs, max_new_tokens=30, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert reply == {"model": "sft", "text": tokenizer.decode(theirs, skip_special_tokens=True).strip(),
                     "finish": "stop", "tokens": len(theirs)}  # fmt: skip


def test_two_models_answer_one_after_the_other(run: Played, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    said = piped("a ?", str(run.path), world.model, "temperature=0", "max_tokens=3", monkeypatch=monkeypatch)
    lines = said.out.splitlines()
    assert lines[:3] == ["── sft", "it is a", "── base"]
    assert said.err.count("it has no chat template") == 1


def test_the_seed_and_the_temperature_decide(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def reply(*settings: str) -> str:
        return piped("a ?", world.model, *settings, monkeypatch=monkeypatch).out

    assert reply("seed=1") == reply("seed=1")
    assert len({reply(f"seed={seed}") for seed in range(5)}) > 1
    assert reply("seed=1", "top_k=1") == reply("temperature=0")


def test_a_model_trained_on_plain_text_is_asked_in_plain_text(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where its tokenizer has a template, which training never used."""
    base = chat_model(tmp_path / "base")
    run = play("sft", tmp_path / "run", model=base, data=world.demonstrations, steps=1, batch_size=4)
    said = piped("a ?", str(run.path), monkeypatch=monkeypatch)
    assert "it was trained on plain text" in said.err
    assert not Speaker(str(run.path), GREEDY).conversational
    assert Speaker(base, GREEDY).conversational


# The reply while it is written --------------------------------------------------------------------------------------


def test_pieces_make_up_the_reply(run: Played) -> None:
    pieces: list[str] = []
    reply = Speaker(str(run.path), GREEDY).reply("b ?", 0, pieces.append)
    assert "".join(pieces) == reply.text == "it is b"
    assert len([piece for piece in pieces if piece]) == 3


def test_a_character_of_several_tokens_comes_whole(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", tokenizer=chatml(), architecture="llama", hidden=32, layers=1, heads=2, mlp=64,
                      context=64, seed=0)  # fmt: skip
    rows = write(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "né 😀 漢!"}])
    run = play("sft", tmp_path / "run", model=str(base), data=rows, steps=60, batch_size=1)
    pieces: list[str] = []
    reply = Speaker(str(run.path), GREEDY).reply("a", 0, pieces.append)
    assert "".join(pieces) == reply.text == "né 😀 漢!"
    assert reply.tokens > len(reply.text) + 1
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_escape_codes_do_not_reach_the_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_model(tmp_path / "base", tokenizer=character_tokenizer("\x1b[31ma"), architecture="llama", hidden=16,
                      layers=1, heads=2, mlp=32, context=64, seed=0)  # fmt: skip
    rows = write(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "\x1b[31ma"}])
    run = play("sft", tmp_path / "run", model=str(base), data=rows, steps=60, batch_size=1)
    said = piped("a", str(run.path), "temperature=0", monkeypatch=monkeypatch)
    assert said.out == "␛[31ma\n"


# A conversation -----------------------------------------------------------------------------------------------------


def test_what_was_said_is_part_of_what_is_asked(run: Played) -> None:
    speaker = Speaker(str(run.path), GREEDY)
    speaker.reply("a ?", 0, lambda piece: None)
    speaker.reply("b ?", 1, lambda piece: None)
    assert [message["content"] for message in speaker.history][:3] == ["a ?", "it is a", "b ?"]
    said = speaker.history
    speaker.history = said * 3
    with pytest.raises(DataError, match=r"sft: \d+ tokens fill the context of 48 tokens; /reset forgets"):
        speaker.reply("a ?", 2, lambda piece: None)


def test_a_reply_that_is_stopped_stays_as_far_as_it_came(run: Played) -> None:
    speaker = Speaker(str(run.path), GREEDY)
    shown: list[str] = []

    def show(piece: str) -> None:
        shown.append(piece)
        if len(shown) == 2:
            raise KeyboardInterrupt

    reply = speaker.reply("c ?", 0, show)
    assert (reply.finish, reply.text) == ("interrupt", "it is")
    assert speaker.history[-1] == {"role": "assistant", "content": "it is"}


def terminal(*arguments: str, keys: list[str]) -> tuple[int, str]:
    """`klimb chat` in a terminal of its own, given `keys` one after the other, each once it waits for them."""
    pid, screen = pty.fork()
    if pid == 0:
        os.environ |= {"TERM": "xterm", "COLUMNS": "80", "OMP_NUM_THREADS": "1"}
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # who runs the tests in the background may have them ignore it
        os.execv(sys.executable, [sys.executable, "-m", "klimb", "chat", *arguments])
    seen, fresh, waiting, last = "", "", list(keys), ""
    while True:
        if not select.select([screen], [], [], 10 if last == "\x03" else 60)[0]:
            if last != "\x03":
                os.kill(pid, signal.SIGKILL)
                break
            # Python's readline notices a Ctrl-C between its prompt and its wait for input with the next key only.
            last = ""
            os.write(screen, b"\x03")
            continue
        try:
            fresh += os.read(screen, 4096).decode(errors="replace")
        except OSError:  # it has left
            break
        if waiting and fresh.endswith("> "):
            last = waiting.pop(0)
            os.write(screen, last.encode())
            seen, fresh = seen + fresh, ""
    seen += fresh
    os.close(screen)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), seen


def test_a_terminal(run: Played) -> None:
    keys = ["a ?\n", "/hepl\n", "\x03", "/reset\n", "zebra\n", "b ?\n", "/quit\n"]
    code, seen = terminal(str(run.path), "temperature=0", "threads=1", keys=keys)
    assert code == 0, seen
    for text in ("\r\nit is a\r\n", "/hepl: no such command", "forgotten", "cannot read this text", "\r\nit is b\r\n"):
        assert text in seen
    assert seen.count("Ctrl-C stops a reply") == 3  # at first, for the unknown command, at Ctrl-C
    assert "Traceback" not in seen


def test_two_models_in_columns(run: Played) -> None:
    code, seen = terminal(str(run.path), run.model, "temperature=0", "threads=1", keys=["a ?\n", "\x04"])
    assert code == 0, seen
    rows = [line for line in seen.splitlines() if line.count("it is a") == 2]
    assert rows, seen
