"""What each column of a type has to hold; a value that is something else is a BadRow."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from klimb.data.source import BadRow
from klimb.types import Message, Text

ROLES = ("system", "developer", "user", "assistant", "tool")
SETTINGS = ("system", "developer")
"""Roles that say how to answer, and ask nothing."""


def tools_of(value: Any) -> list[dict[str, Any]]:
    """As a chat template prints them."""
    if not isinstance(value, list | tuple) or not all(isinstance(tool, Mapping) for tool in value):
        raise BadRow(f"tools is {value!r:.40}, not a list of objects")
    return [dict(tool) for tool in value]


def _text(value: Any, name: str) -> Text:
    if isinstance(value, str):
        return value
    if isinstance(value, list | tuple):
        return _messages(value, name)
    raise BadRow(f"{name} is a {type(value).__name__}, neither a string nor messages")


def _messages(value: Sequence[Any], name: str) -> list[Message]:
    if not value:
        raise BadRow(f"{name} has no messages")
    return [_message(message, f"{name}[{index}]") for index, message in enumerate(value)]


def _message(message: Any, place: str) -> Message:
    if not isinstance(message, Mapping):
        raise BadRow(f"{place} is a {type(message).__name__}, not a message with role and content")
    # A table fills in the columns that a message lacks with nulls, and templates would print them.
    kept = {key: value for key, value in message.items() if value is not None}
    if "tool_calls" in kept:
        kept.setdefault("content", "")
    for key in ("role", "content"):
        if key not in kept:
            raise BadRow(f"{place} has no {key} (it has: {', '.join(map(str, kept)) or 'nothing'})")
    if kept["role"] not in ROLES:
        raise BadRow(f"{place} has the role {kept['role']!r:.40}, known are {', '.join(ROLES)}")
    if not isinstance(kept["content"], str):
        raise BadRow(f"{place} has a {type(kept['content']).__name__} as content, only strings are supported")
    return kept


def _prompt(value: Any, name: str) -> Text:
    text = _text(value, name)
    if isinstance(text, list) and text[-1]["role"] == "assistant":
        raise BadRow(f"{name} ends with an assistant message, so there is nothing to answer")
    if isinstance(text, list):
        _require_question(text, name)
    return text


def _reply(value: Any, name: str) -> Text:
    text = _text(value, name)
    if isinstance(text, str):
        if not text:
            raise BadRow(f"{name} is empty")
        return text
    for message, place in ((text[0], "starts"), (text[-1], "ends")):
        if message["role"] != "assistant":
            raise BadRow(f"{name} {place} with a {message['role']} message, it has to be the assistant's")
    _require_content(text, name)
    return text


def _require_question(messages: list[Message], name: str) -> None:
    first = next((message["role"] for message in messages if message["role"] not in SETTINGS), None)
    if first is None:
        raise BadRow(f"{name} has only a {messages[0]['role']} message, so there is nothing to answer")
    if first == "assistant":
        raise BadRow(f"{name} starts with an assistant message, there has to be something to answer")


def _require_content(messages: list[Message], name: str) -> None:
    for index, message in enumerate(messages):
        # A message with further fields (a call of a tool, say) may do without words.
        if message["role"] == "assistant" and not message["content"] and message.keys() == {"role", "content"}:
            raise BadRow(f"{name}[{index}] is empty")


def _conversation(value: Any, name: str) -> list[Message]:
    if not isinstance(value, list | tuple):
        raise BadRow(f"{name} is a {type(value).__name__}, not a list of messages")
    messages = _messages(value, name)
    if not any(message["role"] == "assistant" for message in messages):
        raise BadRow(f"{name} has no assistant message, so there is nothing to learn")
    _require_question(messages, name)
    _require_content(messages, name)
    return messages


def _plain(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise BadRow(f"{name} is a {type(value).__name__}, not a string")
    if not value:
        raise BadRow(f"{name} is empty")
    return value


def _label(value: Any, name: str) -> bool:
    if isinstance(value, int | float) and value in (0, 1):
        return bool(value)
    if isinstance(value, str) and value.strip().lower() in ("true", "false", "1", "0"):  # all that CSV can say
        return value.strip().lower() in ("true", "1")
    raise BadRow(f"{name} is {value!r:.40}, neither true nor false")


def _labels(value: Any, name: str) -> list[bool]:
    return [_label(item, f"{name}[{index}]") for index, item in enumerate(_list(value, name))]


def _steps(value: Any, name: str) -> list[str]:
    return [_plain(item, f"{name}[{index}]") for index, item in enumerate(_list(value, name))]


def _list(value: Any, name: str) -> Sequence[Any]:
    if not isinstance(value, list | tuple) or not value:
        raise BadRow(f"{name} is {'empty' if isinstance(value, list | tuple) else 'no list'}")
    return value


def _scores(value: Any, name: str) -> list[float]:
    return [_number(item, f"{name}[{index}]") for index, item in enumerate(_list(value, name))]


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise BadRow(f"{name} is {value!r:.40}, not a number")
    return float(value)


TEXTS = ("prompt", "completion", "chosen", "rejected")
CHECKS: dict[str, Callable[[Any, str], Any]] = {
    "prompt": _prompt,
    "completion": _reply,
    "chosen": _reply,
    "rejected": _reply,
    "messages": _conversation,
    "text": _plain,
    "label": _label,
    "labels": _labels,
    "completions": _steps,
    "scores": _scores,
}
