"""A conversation as text, and which of its characters the data wrote and the assistant says.

The chat template is rendered once. Where the contents stand in it is known from a second rendering in which
random sentinels take their place: the template's own text around them has to be, character for character,
what surrounds the contents. What cannot be established with certainty is refused with the reason.
"""

from __future__ import annotations

import copy
import json
import re
import secrets
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple

from klimb.errors import DataError, one_line
from klimb.types import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ':\\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:\\n' }}{% endif %}"
)
"""For models that come without a template of their own."""

CLOCK = datetime(2024, 7, 26)
"""What templates that print the date are told: by the real clock the same run would differ tomorrow."""
CHANGING_PROMPT = "set the template's options (as enable_thinking), or use one whose prompts stay as they are"
CALL_OF_CLOCK = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")


class RenderError(DataError):
    """A text that cannot be rendered, or only into tokens that should not be trained on."""


class Content(NamedTuple):
    """Characters [start, end) that the data wrote, in a message of the assistant or of anybody else."""

    start: int
    end: int
    assistant: bool


@dataclass(frozen=True, slots=True)
class Written:
    """A rendered text. `trained`: the spans [start, end) that the assistant says, end-of-turn token included.

    `cuts`: where tokens have to end, because what follows is sampled one token at a time from there.
    """

    text: str
    contents: list[Content]
    trained: list[tuple[int, int]] = field(default_factory=list)
    cuts: list[int] = field(default_factory=list)


class Hole(NamedTuple):
    """Where a message's content stands: behind `before`, then `lead`.

    `lead` and `tail` are the template's own part of what the assistant says, before and after the content;
    both are empty where the message is not trained.
    """

    message: int
    before: str
    lead: str
    tail: str


@dataclass(frozen=True, slots=True)
class Skeleton:
    """What a template writes around the contents of messages with these roles, and after the last of them."""

    holes: tuple[Hole, ...]
    after: str

    def align(self, text: str, position: int, contents: Sequence[str]) -> list[tuple[int, int, int]]:
        """(turn, start, end) of each hole in text[position:]: where its turn and its content stand.

        A template may strip white space around a content, or leave out a lead that the content has of its own
        (its thinking, say), and nothing else.
        """
        found: list[tuple[int, int, int]] = []
        following = [hole.tail + self.holes[i + 1].before for i, hole in enumerate(self.holes[:-1])]
        following += [self.holes[-1].tail + self.after] if self.holes else []
        for hole, then in zip(self.holes, following):
            before = "" if found else hole.before
            if not text.startswith(before, position):
                raise RenderError("the chat template starts otherwise, depending on the contents")
            turn = position + len(before)
            whole = contents[hole.message]
            for lead, kept in product(dict.fromkeys((hole.lead, "")), _stripped(whole)):
                if text.startswith(lead + kept + then, turn):
                    break
            else:
                raise RenderError(
                    f"the chat template rewrites the content of message {hole.message}",
                    why=f"{_excerpt(hole.lead + whole)} became {_excerpt(text[turn:])}",
                    fix="change the content or the template; reasoning may belong into a field of its own",
                )
            start = turn + len(lead)
            found.append((turn, start, start + len(kept)))
            position = start + len(kept) + len(then)
        if position != len(text):
            raise RenderError("the chat template ends otherwise, depending on the contents")
        return found


class ChatTemplate:
    """The tokenizer's chat template, or the plain one, with the options that it is rendered with.

    source: the template; end: what ends the assistant's turn; control: literals that no content may become.
    Raises RenderError where the template does not say where an assistant's turn ends.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        added: Collection[str],
        special: Collection[str],
        options: dict[str, Any],
    ) -> None:
        """added: literals of the tokens that are matched as a whole; special: those that are no text."""
        self._model = tokenizer.name_or_path
        self._variables = {**tokenizer.special_tokens_map, **options}
        self._skeletons: dict[tuple[object, ...], Skeleton] = {}
        self.source: str = tokenizer.get_chat_template() if tokenizer.chat_template else _plain(tokenizer)
        self._timeless = CALL_OF_CLOCK.sub(lambda call: repr(CLOCK.strftime(call[2])), self.source)
        self._marked = re.search(r"{%-?\s*generation\b", self.source) is not None
        try:
            self.end, markers = self._probe(added)
        except RenderError as error:
            raise RenderError(str(error), where=self._model) from error
        self.control: frozenset[str] = frozenset(special) | markers
        self._control = re.compile(any_of(self.control))

    def with_tools(self, tools: Sequence[dict[str, Any]]) -> ChatTemplate:
        """The template with these tools printed in it. Raises RenderError where it prints none."""
        if match := self._control.search(json.dumps(tools, ensure_ascii=False)):
            raise RenderError(f"the tools have {match[0]!r} in them", fix="take it out")
        bound = copy.copy(self)
        bound._variables, bound._skeletons = {**self._variables, "tools": list(tools)}, {}
        question = [{"role": "user", "content": _sentinel()}]
        if bound.render(question)[0] == self.render(question)[0]:
            raise RenderError("the chat template does not print the row's tools", fix="use one that does")
        return bound

    def _probe(self, added: Collection[str]) -> tuple[str, frozenset[str]]:
        """From one question and answer: what ends the assistant's turn, and what sets turns apart."""
        question, answer = (_sentinel() for _ in range(2))
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        asked, answered = self.render(messages[:1])[0], self.render(messages)[0]
        after = answered.partition(answer)[2]
        end = re.match(rf"\s*({any_of(added)})", after)
        if end is None or question not in asked:
            raise RenderError(
                "the chat template cannot be trained on",
                why=f"no token ends the assistant's turn, it is followed by {_excerpt(after)}",
                fix="use a template that writes an end-of-turn token there",
            )
        return end[1], frozenset(literal for literal in added if literal in asked) | {end[1]}

    def render(self, messages: Sequence[Message], generation_prompt: bool = False) -> tuple[str, list[tuple[int, int]]]:
        """The text, and the spans that the template marks as generated."""
        from klimb.data.sandbox import STEPS, TooManySteps, render_template

        try:
            texts, spans = render_template(
                conversations=[list(messages)],
                chat_template=self._timeless,
                return_assistant_tokens_mask=self._marked,
                add_generation_prompt=generation_prompt,
                **self._variables,
            )
        except TooManySteps:  # no row's fault, and every row would wait for it
            raise DataError(
                "the chat template does not end", where=self._model,
                why=f"{STEPS:,} steps were not enough for one conversation", fix="use another",
            ) from None  # fmt: skip
        except Exception as error:  # a template is a program of somebody else's and raises what it likes
            raise RenderError(
                "the chat template refuses the conversation", why=one_line(error), fix="change one or the other"
            ) from error
        return texts[0], [(start, end) for start, end in spans[0]] if self._marked else []

    def asked(self, prompt: Sequence[Message]) -> Written:
        """Up to where the assistant begins to speak."""
        self._check_fields(prompt)
        text, _ = self.render(prompt, generation_prompt=True)
        contents = [message["content"] for message in prompt]
        try:
            skeleton = self._skeleton(prompt, len(prompt), generation_prompt=True)
            spans = skeleton.align(text, 0, contents)
        except RenderError:
            # A prompt may be rewritten (templates drop old thinking): nothing of it is trained.
            if self._holds_control(contents):
                raise
            return Written(text, self._between_control(text, 0))
        return Written(text, [_content(prompt[hole.message], *span) for hole, span in zip(skeleton.holes, spans)])

    def answered(self, prompt: Sequence[Message], answer: Sequence[Message]) -> Written:
        """All of it, trained on what the assistant says in `answer`."""
        asked, messages = self.asked(prompt), [*prompt, *answer]
        self._check_fields(answer)
        text, marks = self.render(messages)
        border = len(asked.text)
        if not text.startswith(asked.text):
            raise RenderError(
                "the chat template renders the prompt otherwise once it is answered",
                why=_difference(asked.text, text),
                fix=CHANGING_PROMPT,
            )
        contents = [message["content"] for message in messages]
        skeleton = self._skeleton(messages, len(prompt), False)
        try:
            spans = skeleton.align(text, border, contents)
        except RenderError:
            if not self._marked or self._holds_control(contents[len(prompt) :]):
                raise
            trained = [(max(span[0], border), self._marked_end(text, *span)) for span in marks if span[1] > border]
            written = self._between_control(text, border)
        else:
            trained = []
            for hole, (turn, start, end) in zip(skeleton.holes, spans):
                if hole.tail:
                    trained.append((turn, end + len(hole.tail)))
                    if start == end and messages[hole.message].keys() == {"role", "content"}:
                        raise RenderError("the completion is empty", why="the chat template strips white space")
            written = [_content(messages[hole.message], *span) for hole, span in zip(skeleton.holes, spans)]
        return Written(text, asked.contents + written, trained, [border, *(start for start, _ in trained)])

    def _holds_control(self, contents: Sequence[str]) -> bool:
        return any(self._control.search(content) for content in contents)

    def _between_control(self, text: str, start: int) -> list[Content]:
        """Where contents were rewritten but hold no control token: those in the text are all the template's."""
        borders = [at for match in self._control.finditer(text, start) for at in match.span()]
        return [Content(a, b, True) for a, b in zip([start, *borders[1::2]], [*borders[::2], len(text)])]

    def _check_fields(self, messages: Sequence[Message]) -> None:
        """Only contents are kept from becoming control tokens, so the other fields must not hold any."""
        for index, message in enumerate(messages):
            further = str([value for key, value in message.items() if key != "content"])
            if match := self._control.search(further):
                raise RenderError(f"message {index} has {match[0]!r} outside its content", fix="take it out")

    # --- skeletons ---------------------------------------------------------------------------------------

    def _skeleton(self, messages: Sequence[Message], first: int, generation_prompt: bool) -> Skeleton:
        """Depends on roles alone, where messages have nothing but role and content, and is then kept."""
        if any(message.keys() != {"role", "content"} for message in messages):
            return self._new_skeleton(messages, first, generation_prompt)
        key = (first, generation_prompt, *(message["role"] for message in messages))
        if key not in self._skeletons:
            self._skeletons[key] = self._new_skeleton(messages, first, generation_prompt)
        return self._skeletons[key]

    def _new_skeleton(self, messages: Sequence[Message], first: int, generation_prompt: bool) -> Skeleton:
        """Of all messages, or of those from `first` on and trained, if there are any."""
        sentinels = [_sentinel() for _ in messages]
        stand_ins = [{**message, "content": sentinel} for message, sentinel in zip(messages, sentinels)]
        text, marks = self.render(stand_ins, generation_prompt)
        for index, sentinel in enumerate(sentinels):
            if text.count(sentinel) != 1:
                verb = "repeats" if sentinel in text else "drops or rewrites"
                raise RenderError(f"the chat template {verb} the content of message {index}", fix="use another")
        position = self._sampled_from(stand_ins, first, text) if first < len(messages) else 0
        holes = []
        for index in sorted(range(len(messages)), key=lambda index: text.index(sentinels[index])):
            start = text.index(sentinels[index])
            if start < position and index < first:
                continue
            end = start + len(sentinels[index])
            trained = index >= first and messages[index]["role"] == "assistant"
            turn, said = self._turn(stand_ins, index, text, marks) if trained else (start, end)
            holes.append(Hole(index, text[position:turn], text[turn:start], text[end:said]))
            position = said
        return Skeleton(tuple(holes), text[position:])

    def _turn(
        self, stand_ins: Sequence[Message], index: int, text: str, marks: list[tuple[int, int]]
    ) -> tuple[int, int]:
        """From where the model samples message `index` to the end of its end token; nothing if marks omit it."""
        start = text.index(stand_ins[index]["content"])
        end = start + len(stand_ins[index]["content"])
        others = [at for message in stand_ins if (at := text.index(message["content"])) > start]
        said = self._turn_end(text, end, min(others, default=len(text)))
        if self._marked:
            asked = self.render(stand_ins[:index], generation_prompt=True)[0]
            sampled = len(asked) if text.startswith(asked) and len(asked) <= start else 0
            return next(((max(mark, sampled), said) for mark, stop in marks if mark <= start < stop), (start, end))
        sampled = self._sampled_from(stand_ins, index, text)
        answered = self.render(stand_ins[: index + 1])[0]
        if answered[:said] != text[:said]:
            raise RenderError(
                f"the chat template rewrites the assistant's message {index} when others follow",
                why=_difference(answered[:said], text),
                fix="train on the last turn alone, as prompt and completion",
            )
        return sampled, said

    def _sampled_from(self, stand_ins: Sequence[Message], index: int, text: str) -> int:
        """Where a prompt that asks for message `index` ends, in the text of the whole conversation."""
        asked = self.render(stand_ins[:index], generation_prompt=True)[0]
        if not text.startswith(asked):
            raise RenderError(
                f"the chat template renders what precedes message {index} otherwise once it is answered",
                why=_difference(asked, text),
                fix=CHANGING_PROMPT,
            )
        return len(asked)

    def _marked_end(self, text: str, start: int, end: int) -> int:
        """Within the mark, or right behind it."""
        return self._turn_end(text, start, len(text) - len(text[end:].lstrip()) + len(self.end))

    def _turn_end(self, text: str, after: int, limit: int) -> int:
        at = text.find(self.end, after, limit)
        if at < 0:
            raise RenderError(
                f"the chat template does not end this assistant's turn with {self.end!r}",
                fix="train on the last turn alone, as prompt and completion",
            )
        return at + len(self.end)


def _content(message: Message, turn: int, start: int, end: int) -> Content:
    return Content(start, end, message["role"] == "assistant")


def _stripped(content: str) -> Iterable[str]:
    """As it is, then in each way in which templates strip white space."""
    yield content
    for characters in (None, "\n"):
        yield from (content.strip(characters), content.lstrip(characters), content.rstrip(characters))


def _plain(tokenizer: PreTrainedTokenizerBase) -> str:
    if tokenizer.eos_token is None:
        raise RenderError("the tokenizer has neither a chat template nor an EOS token", fix="set its eos_token")
    adds_bos = tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    return "{{ bos_token }}" + PLAIN_TEMPLATE if adds_bos else PLAIN_TEMPLATE


def _sentinel() -> str:
    """Twenty random digits: nothing in upper or lower case, and no text has them by chance."""
    return "".join(secrets.choice("0123456789") for _ in range(20))


def any_of(literals: Collection[str]) -> str:
    """A pattern; longer ones first, since some begin others. Of nothing: it never matches."""
    return "|".join(re.escape(literal) for literal in sorted(literals, key=len, reverse=True)) or "(?!)"


def _excerpt(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:40] + "…")


def _difference(expected: str, text: str) -> str:
    at = next((i for i, (a, b) in enumerate(zip(expected, text)) if a != b), min(len(expected), len(text)))
    return f"{_excerpt(expected[at:])} became {_excerpt(text[at:])} at character {at}"
