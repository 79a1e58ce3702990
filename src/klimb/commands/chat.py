"""`klimb chat`: one model, or two side by side, asked in the form that they were trained on, shown while they write."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from pydantic import Field

from klimb.commands.export import stop_tokens
from klimb.commands.trained import Trained, model_of
from klimb.config import StageConfig, load_config
from klimb.data.render import Renderer
from klimb.errors import ConfigError, DataError, KlimbError
from klimb.models.backbone import Backbone
from klimb.models.code import pinned
from klimb.models.load import check_vocabulary, load_causal, resolve_device, resolve_dtype
from klimb.models.place import is_classifier, load_tokenizer
from klimb.models.probe import probed_policy
from klimb.report.text import visible
from klimb.rollout.engine import Request
from klimb.rollout.local import LocalEngine
from klimb.rollout.sampling import SamplingParams
from klimb.stages.common import say_aside, stream_seed
from klimb.stages.trust import pins_of, problems
from klimb.types import Message, Prompt, Text

HELP = "/reset forgets the conversation, /quit or Ctrl-D leaves, Ctrl-C stops a reply"


class ChatConfig(StageConfig):
    """What `klimb chat MODEL key=value …` takes; the defaults sample as training does."""

    max_tokens: int = Field(256, ge=1, description="longest reply")
    temperature: float = Field(1.0, ge=0, description="0: greedy")
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    repetition_penalty: float = Field(1.0, gt=0)
    system: str | None = Field(None, description="system message before every conversation")
    trust_remote_code: bool = Field(False, description="run the Python code that comes with the model; read it before")
    revision: str | None = Field(None, description="commit of a hub model, 40 hex digits")
    seed: int = Field(0, ge=0)
    device: str = "auto"
    dtype: str = "auto"
    threads: int | None = Field(None, ge=1, description="CPU threads; default: all cores")


class Reply(NamedTuple):
    """text: without control tokens; finish: "stop", "length", or "interrupt" where Ctrl-C ended it."""

    text: str
    finish: str
    tokens: int


class Speaker:
    """A model in a conversation."""

    def __init__(self, place: str, config: ChatConfig) -> None:
        """place: a run, a model directory or a hub name. Raises KlimbError where no policy can be loaded from it."""
        model, run = model_of(place)
        if is_classifier(model):
            raise ConfigError("is a reward model", where=place, why="it scores texts and writes none",
                              fix="chat with a policy; sample … reward=DIR shows its scores")  # fmt: skip
        self.name = run.path.name if run is not None else Path(place).name
        self.config = config
        self.history: list[Message] = []
        device = resolve_device(config.device, samples=True)
        for problem in problems(model, config.trust_remote_code, config.revision):
            raise ConfigError(problem, where="chat")
        with pinned(pins_of(model, config.trust_remote_code, config.revision)):
            network, adapter = load_causal(model, device, resolve_dtype(config.dtype, device))
            tokenizer = load_tokenizer(model)
        check_vocabulary(network, tokenizer, model)
        self.policy, _ = probed_policy(Backbone(network, adapter), None)
        self.renderer = Renderer(tokenizer, system=config.system)
        self.conversational = _conversational(place, tokenizer.chat_template is not None, run)
        if config.system is not None and not self.conversational:
            raise ConfigError("system: is part of a chat template", where=place, why="this model takes plain text",
                              fix="leave system out")  # fmt: skip
        self.stop = self.renderer.stop_tokens(self.conversational) | {*stop_tokens(Path(model), tokenizer)}

    def reply(self, text: str, turn: int, show: Callable[[str], None]) -> Reply:
        """Ask; `show` is given each further piece of the reply. Raises KlimbError where it has no room to answer."""
        asked: Text = [*self.history, {"role": "user", "content": text}] if self.conversational else text
        prompt = self.renderer.prompt(asked)
        context = self.policy.backbone.context
        if len(prompt) >= context:
            fix = "/reset forgets the conversation" if self.history else "ask something shorter"
            raise DataError(f"{len(prompt)} tokens fill the context of {context} tokens", where=self.name, fix=fix)
        settings = self.config
        params = SamplingParams(
            min(settings.max_tokens, context - len(prompt)), self.stop, settings.temperature, settings.top_k,
            settings.top_p, settings.repetition_penalty,
        )  # fmt: skip
        tokens: list[int] = []
        shown = ""

        def written(whole: bool) -> str:
            """What is settled of the reply: a character of several tokens waits for the last of them."""
            nonlocal shown
            now = visible(self._text(tokens))
            now = now if whole else now.rstrip("\N{REPLACEMENT CHARACTER}")
            show(now[len(shown) :])
            shown = max(shown, now, key=len)
            return now

        def drawn(_: int) -> None:
            tokens.extend(engine.newest)
            written(False)

        engine = LocalEngine(self.policy, self._text, max_rows=1, on_tokens=drawn)
        engine.submit([Request(Prompt("chat", prompt, asked), 1, params, stream_seed(settings.seed, "chat", turn))])
        finish = "interrupt"
        try:
            [(_, sample)] = engine.stream()
            finish = sample.finish
        except KeyboardInterrupt:
            pass
        said = written(True)
        if self.conversational:
            answer: Message = {"role": "assistant", "content": self._text(tokens)}
            self.history = [*self.history, {"role": "user", "content": text}, answer]
        return Reply(said, finish, len(tokens))

    def _text(self, tokens: list[int]) -> str:
        found = self.renderer.decode(tokens, "" if not self.conversational else [])
        return found if isinstance(found, str) else found[0]["content"]


def _conversational(place: str, has_template: bool, run: Trained | None) -> bool:
    """Conversations where it was trained on them, or where nobody knows and there is a template; else plain text."""
    trained = run.conversational if run is not None else None
    if trained or (trained is None and has_template):
        return True
    why = "it was trained on plain text" if trained is False else "it has no chat template"
    say_aside(f"{place}: {why}: what you type is continued as it stands, without what was said before")
    return False


def chat(places: Sequence[str], overrides: Sequence[str], as_json: bool = False) -> None:
    """Talk in the terminal, or answer what standard input holds, once."""
    config = load_config(ChatConfig, {}, overrides, where="command line")
    if not 1 <= len(places) <= 2:
        raise ConfigError(f"one model or two, not {len(places)}", where="command line",
                          fix="write klimb chat RUN, or klimb chat RUN RUN")  # fmt: skip
    torch.set_num_threads(config.threads or torch.get_num_threads())
    speakers = [Speaker(place, config) for place in places]
    if len({speaker.name for speaker in speakers}) < len(speakers):
        for speaker, place in zip(speakers, places):
            speaker.name = place
    if not sys.stdin.isatty():
        _answer_once(speakers, as_json)
    elif as_json:
        raise ConfigError("--json answers one prompt", where="command line", fix="give it: echo hi | klimb chat …")
    else:
        _converse(speakers)


def _answer_once(speakers: Sequence[Speaker], as_json: bool) -> None:
    try:
        text = sys.stdin.read().rstrip("\n")
    except UnicodeDecodeError as error:
        raise DataError("is no UTF-8", where="standard input", why=error, fix="convert it") from None
    if not text.strip():
        raise DataError("holds no prompt", where="standard input", fix="write echo hi | klimb chat …")
    if as_json:
        replies = [{"model": each.name, **each.reply(text, 0, lambda piece: None)._asdict()} for each in speakers]
        print(json.dumps(replies, indent=1, ensure_ascii=False))
        return
    for speaker in speakers:
        if len(speakers) > 1:
            print(f"── {speaker.name}")
        _speak(speaker, text, 0)


def _converse(speakers: Sequence[Speaker]) -> None:
    """Until /quit or the end of input. A line that begins with / is for klimb, any other for the models."""
    import readline  # noqa: F401  lets input() edit lines and remember them

    say_aside(HELP)
    turn = 0
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            say_aside(HELP)
            continue
        if text == "/quit":
            return
        if text == "/reset":
            turn = 0
            for speaker in speakers:
                speaker.history = []
            say_aside("forgotten")
        elif text.startswith("/"):
            say_aside(f"{text.split()[0]}: no such command; {HELP}")
        elif text:
            _answer(speakers, text, turn)
            turn += 1


def _answer(speakers: Sequence[Speaker], text: str, turn: int) -> None:
    """A mistake in one turn (no room, unknown words) is told, and the conversation goes on."""
    try:
        if len(speakers) > 1:
            _side_by_side(speakers, text, turn)
        else:
            _speak(speakers[0], text, turn)
    except KlimbError as error:
        say_aside(f"klimb: {error}")


def _speak(speaker: Speaker, text: str, turn: int) -> None:
    reply = speaker.reply(text, turn, lambda piece: print(piece, end="", flush=True))
    print(flush=True)
    if note := _note(reply):
        say_aside(note)


def _side_by_side(speakers: Sequence[Speaker], text: str, turn: int) -> None:
    """A column each; they write one after the other."""
    from rich.console import Console
    from rich.live import Live
    from rich.table import Table
    from rich.text import Text as Shown

    columns = [Shown() for _ in speakers]
    table = Table(*(speaker.name for speaker in speakers), expand=True)
    for each in table.columns:
        each.ratio = 1
    table.add_row(*columns)
    with Live(table, console=Console(highlight=False), auto_refresh=False) as live:

        def show_in(column: Shown) -> Callable[[str], None]:
            def show(piece: str) -> None:
                column.append(piece)
                live.refresh()

            return show

        for speaker, column in zip(speakers, columns):
            if note := _note(speaker.reply(text, turn, show_in(column))):
                column.append(f"\n{note}", style="dim")
        live.refresh()


def _note(reply: Reply) -> str:
    """Why a reply ended, where it did not end of itself."""
    return {"length": f"(cut at {reply.tokens} tokens)", "interrupt": "(stopped)"}.get(reply.finish, "")
