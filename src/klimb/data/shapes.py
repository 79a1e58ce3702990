"""Rows in the shapes of others → ours: ShareGPT, transcripts of Human: and Assistant:, lists written as text."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from klimb.data.formats import check_text
from klimb.data.readers import MALFORMED, parsed
from klimb.data.source import BadRow
from klimb.types import Message

SPEAKERS = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "bard": "assistant",
    "bing": "assistant", "assistant": "assistant", "model": "assistant", "system": "system", "tool": "tool",
    "observation": "tool",
}  # fmt: skip
"""Who ShareGPT's `from` means."""
CONVERSATIONS = ("conversations", "conversation")
LISTS = (*CONVERSATIONS, "messages", "tools", "completions", "labels", "scores", "ranks")
"""Columns that are never text: CSV and some data sets write their lists as JSON."""
TEXTS = ("prompt", "completion", "chosen", "rejected", "text")
TURN = re.compile(r"\n\n(Human|Assistant):")


def ours(values: dict[str, Any], transcripts: bool = False) -> dict[str, Any]:
    """The row with `messages` (or, of a comparison, `prompt`) where it has `conversations`, and the like.

    transcripts: texts that are transcripts become messages, and all have to be some. Raises BadRow.
    """
    values = {name: _parsed(value, name) for name, value in values.items()}
    named = next((name for name in CONVERSATIONS if name in values), None)
    if named and isinstance(values[named], list | tuple):
        place = "prompt" if "chosen" in values else "messages"
        if values.get(place) is None:
            values[place] = _with_system(_messages(values.pop(named), named), values.pop("system", None))
    for name in (*TEXTS, "messages"):
        if name in values:
            values[name] = _messages(values[name], name)
    ranks = values.get("ranks")
    if "completions" in values and "scores" not in values and isinstance(ranks, list | tuple):
        values["scores"] = [-rank if isinstance(rank, int | float) else rank for rank in ranks]
    return _spoken(values) if transcripts else values


def _parsed(value: Any, name: str) -> Any:
    if name not in LISTS or not isinstance(value, str) or not value.strip():
        return value
    try:
        found = parsed(value)
        check_text(found)
    except BadRow as error:
        raise BadRow(f"{name} is text, and no JSON: {str(error).removeprefix(MALFORMED).lstrip()}") from None
    return found


def _messages(value: Any, name: str) -> Any:
    """ShareGPT's turns as messages, a single message as a list of one; all else as it is."""
    if isinstance(value, Mapping) and ({"from", "value"} <= value.keys() or {"role", "content"} <= value.keys()):
        value = [value]
    if not isinstance(value, list | tuple):
        return value
    return [_message(turn, f"{name}[{index}]") for index, turn in enumerate(value)]


def _message(turn: Any, place: str) -> Any:
    if not isinstance(turn, Mapping) or "from" not in turn or "role" in turn:
        return turn
    if not isinstance(turn["from"], str) or turn["from"] not in SPEAKERS:
        raise BadRow(f"{place} is from {turn['from']!r:.40}, known are {', '.join(SPEAKERS)}")
    further = {key: item for key, item in turn.items() if key not in ("from", "value", "weight")}
    return {"role": SPEAKERS[turn["from"]], "content": turn.get("value"), **further}


def _with_system(messages: list[Any], system: Any) -> list[Any]:
    starts = messages[0] if messages and isinstance(messages[0], Mapping) else {}
    if not isinstance(system, str) or not system or starts.get("role") == "system":
        return messages
    return [{"role": "system", "content": system}, *messages]


# --- transcripts --------------------------------------------------------------------------------------------


def _spoken(values: dict[str, Any]) -> dict[str, Any]:
    found = {name: _transcript(values[name], name) for name in TEXTS if isinstance(values.get(name), str)}
    if "text" in found:
        found["messages"] = found.pop("text")
        values = {name: value for name, value in values.items() if name != "text"}
    return {**values, **found}


def _transcript(text: str, name: str) -> list[Message]:
    """`\\n\\nHuman: … \\n\\nAssistant: …` as messages. A reply alone is the assistant's."""
    whole = text if text.startswith("\n\n") else f"\n\n{text}"
    marks = list(TURN.finditer(whole))
    if not marks or marks[0].start() > 0:
        if name in ("prompt", "text"):
            raise BadRow(f"{name} is no transcript: it does not begin with Human: or Assistant:")
        whole, marks = f"\n\nAssistant: {text}", list(TURN.finditer(f"\n\nAssistant: {text}"))
    ends = [*(mark.start() for mark in marks[1:]), len(whole)]
    turns = [
        {"role": "user" if mark[1] == "Human" else "assistant", "content": whole[mark.end() : end].strip()}
        for mark, end in zip(marks, ends)
    ]
    asks = name == "prompt" and turns[-1]["role"] == "assistant" and not turns[-1]["content"]
    return turns[:-1] if asks else turns
