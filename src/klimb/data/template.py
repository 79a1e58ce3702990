"""A conversation as text, and which of its characters the data wrote and the assistant says.

The chat template is rendered once. Where the contents stand in it is known from a second rendering in which
random sentinels take their place: the template's own text around them has to be, character for character,
what surrounds the contents. What cannot be established with certainty is refused with the reason.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from datetime import datetime
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


@dataclass(frozen=True, slots=True)
class Skeleton:
    """What a template writes around the contents of messages with these roles.

    parts: H + 1 runs of the template's text around H contents; order [H]: the message whose content stands
    there; trained: (which content, characters trained before it, characters trained after it).
    """

    parts: tuple[str, ...]
    order: tuple[int, ...]
    trained: tuple[tuple[int, int, int], ...]

    def align(self, text: str, contents: Sequence[str]) -> list[tuple[int, int]]:
        """Where each content stands in `text`; a template may strip white space around it, nothing else."""
        if not text.startswith(self.parts[0]):
            raise RenderError(
                "the chat template writes something else at the start, depending on the contents"
            )
        position = len(self.parts[0])
        spans = []
        for index, part in zip(self.order, self.parts[1:]):
            whole = contents[index]
            for kept in (whole, whole.strip(), whole.strip("\n"), whole.lstrip(), whole.rstrip()):
                if text.startswith(kept + part, position):
                    break
            else:
                raise RenderError(
                    f"the chat template rewrites the content of message {index}",
                    why=f"{_excerpt(whole)} became {_excerpt(text[position:])}",
                    fix="change the content or the template; reasoning may belong into a field of its own",
                )
            spans.append((position, position + len(kept)))
            position += len(kept) + len(part)
        if position != len(text):
            raise RenderError("the chat template writes something else at the end, depending on the contents")
        return spans


class ChatTemplate:
    """The tokenizer's chat template, or the plain one, with the options that it is rendered with.

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
        self._variables = {**tokenizer.special_tokens_map, **options}
        self._skeletons: dict[tuple[object, ...], Skeleton] = {}
        self.source: str = tokenizer.get_chat_template() if tokenizer.chat_template else _plain(tokenizer)
        self._timeless = CALL_OF_CLOCK.sub(lambda call: repr(CLOCK.strftime(call[2])), self.source)
        self.marked = re.search(r"{%-?\s*generation\b", self.source) is not None
        self.end, markers = self._probe(added)
        self.control: frozenset[str] = frozenset(special) | markers

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

    def render(
        self, messages: Sequence[Message], generation_prompt: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        """The text, and the spans that the template marks as generated."""
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            texts, spans = render_jinja_template(
                conversations=[list(messages)],
                chat_template=self._timeless,
                return_assistant_tokens_mask=self.marked,
                add_generation_prompt=generation_prompt,
                **self._variables,
            )
        except Exception as error:  # a template is a program of somebody else's and raises what it likes
            raise RenderError("the chat template refuses the conversation", why=one_line(error)) from error
        return texts[0], [(start, end) for start, end in spans[0]] if self.marked else []

    def prompt(self, messages: Sequence[Message]) -> Written:
        """Up to where the assistant begins to speak."""
        return self._written(messages, len(messages), generation_prompt=True)

    def conversation(self, messages: Sequence[Message], first: int = 0) -> Written:
        """Everything, trained on what the assistant says from message `first` on."""
        return self._written(messages, first, generation_prompt=False)

    def _written(self, messages: Sequence[Message], first: int, generation_prompt: bool) -> Written:
        self._check_fields(messages)
        contents = [message["content"] for message in messages]
        text, marks = self.render(messages, generation_prompt)
        try:
            skeleton = self._skeleton(messages, first, generation_prompt)
            spans = skeleton.align(text, contents)
        except RenderError:
            if not self.marked or re.search(any_of(self.control), "\0".join(contents)):
                raise
            return self._written_by_marks(text, marks)
        trained = [
            (spans[hole][0] - before, spans[hole][1] + after) for hole, before, after in skeleton.trained
        ]
        for hole, before, _ in skeleton.trained:
            if spans[hole][0] == spans[hole][1] and not before:
                raise RenderError("the completion is empty", why="the chat template strips white space")
        owned = [
            Content(start, end, messages[index]["role"] == "assistant")
            for index, (start, end) in zip(skeleton.order, spans)
        ]
        return Written(text, owned, trained, [start for start, _ in trained])

    def _written_by_marks(self, text: str, marks: list[tuple[int, int]]) -> Written:
        """Where contents were rewritten but hold no control token: all in the text are the template's."""
        trained = [(start, self._turn_end(text, start, len(text))) for start, _ in marks]
        borders = [
            0,
            *(at for match in re.finditer(any_of(self.control), text) for at in match.span()),
            len(text),
        ]
        between = [Content(start, end, True) for start, end in zip(borders[::2], borders[1::2])]
        return Written(text, between, trained, [start for start, _ in trained])

    def _check_fields(self, messages: Sequence[Message]) -> None:
        """Only contents are kept from becoming control tokens, so the other fields must not hold any."""
        for index, message in enumerate(messages):
            further = str([value for key, value in message.items() if key != "content"])
            for literal in self.control:
                if literal in further:
                    raise RenderError(
                        f"message {index} has {literal!r} outside its content", fix="take it out"
                    )

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
        sentinels = [_sentinel() for _ in messages]
        stand_ins = [{**message, "content": sentinel} for message, sentinel in zip(messages, sentinels)]
        text, marks = self.render(stand_ins, generation_prompt)
        for index, sentinel in enumerate(sentinels):
            if text.count(sentinel) != 1:
                verb = "repeats" if sentinel in text else "drops or rewrites"
                raise RenderError(
                    f"the chat template {verb} the content of message {index}", fix="use another"
                )
        order = sorted(range(len(messages)), key=lambda index: text.index(sentinels[index]))
        starts = [text.index(sentinels[index]) for index in order]
        parts = re.split("|".join(sentinels), text) if sentinels else [text]
        trained = []
        for hole, index in enumerate(order):
            if index < first or messages[index]["role"] != "assistant":
                continue
            content = starts[hole], starts[hole] + len(sentinels[index])
            limit = starts[hole + 1] if hole + 1 < len(starts) else len(text)
            end = self._turn_end(text, content[1], limit)
            start = self._turn_start(stand_ins, index, text, content[0], end, marks)
            if start is not None:
                trained.append((hole, content[0] - start, end - content[1]))
        return Skeleton(tuple(parts), tuple(order), tuple(trained))

    def _turn_end(self, text: str, after: int, limit: int) -> int:
        at = text.find(self.end, after, limit)
        if at < 0:
            raise RenderError(
                f"the chat template does not end this assistant's turn with {self.end!r}",
                fix="train on the last turn alone, as prompt and completion",
            )
        return at + len(self.end)

    def _turn_start(
        self,
        messages: Sequence[Message],
        index: int,
        text: str,
        content: int,
        end: int,
        marks: list[tuple[int, int]],
    ) -> int | None:
        """Where the model would begin to sample message `index`; None where marks leave the message out."""
        if self.marked:
            return next((start for start, stop in marks if start <= content < stop), None)
        asked = self.render(messages[:index], generation_prompt=True)[0]
        answered = self.render(messages[: index + 1])[0]
        if not text.startswith(asked) or len(asked) > content:
            raise RenderError(
                f"the chat template renders what precedes message {index} differently once it is answered",
                why=difference(asked, text),
                fix="use a template whose prompts stay as they are",
            )
        if answered[:end] != text[:end]:
            raise RenderError(
                f"the chat template rewrites the assistant's message {index} when others follow",
                why=difference(answered[:end], text),
                fix="train on the last turn alone, as prompt and completion",
            )
        return len(asked)


def _plain(tokenizer: PreTrainedTokenizerBase) -> str:
    if tokenizer.eos_token is None:
        raise RenderError(
            "the tokenizer has neither a chat template nor an EOS token", fix="set its eos_token"
        )
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


def difference(expected: str, text: str) -> str:
    at = next((i for i, (a, b) in enumerate(zip(expected, text)) if a != b), min(len(expected), len(text)))
    return f"{_excerpt(expected[at:])} became {_excerpt(text[at:])} at character {at}"
