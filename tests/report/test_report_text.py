"""Hostile text is shown, numbers read well."""

from __future__ import annotations

import math

import pytest

from klimb.report.text import clipped, duration, finite, number, plain, visible, without_credentials


@pytest.mark.parametrize(
    ("hostile", "shown"),
    [
        ("\x1b[31mred\x1b[0m", "␛[31mred␛[0m"),
        ("a\x00b\x07\x7f", "a␀b␇␡"),
        ("a\rb\nc\td", "a␍b\nc\td"),
        ("\x9b31m", "⟨U+009B⟩31m"),  # the one-character form of ESC [
        ("user\u202egnp.exe", "user⟨U+202E⟩gnp.exe"),
        ("\u2066x\u2069\u200b\ufeff", "⟨U+2066⟩x⟨U+2069⟩⟨U+200B⟩⟨U+FEFF⟩"),
        ("\U000e0041", "⟨U+E0041⟩"),  # tag characters smuggle whole prompts
        ("\ud800", "⟨U+D800⟩"),  # a lone surrogate cannot be written as UTF-8
        ("Grüße, 你好, שלום", "Grüße, 你好, שלום"),
    ],
)
def test_invisible_characters_become_visible(hostile: str, shown: str) -> None:
    assert visible(hostile) == shown
    assert visible(shown) == shown


def test_clipped_says_how_much_is_missing() -> None:
    assert clipped("a" * 10, 10) == "a" * 10
    assert clipped("a" * 2010, 10) == "a" * 10 + " … (2,000 more characters)"


def test_numbers() -> None:
    assert [number(1.005, 1), number(-1.97), number(None), number(-0.001)] == ["1.0", "−1.97", "–", "0.00"]
    assert [duration(9.96), duration(125), duration(7260), duration(None)] == [
        "10.0 s",
        "2 min 05 s",
        "2 h 01 min",
        "–",
    ]
    assert [finite(value) for value in (1, True, "1", math.nan, math.inf, None)] == [
        1.0,
        None,
        None,
        None,
        None,
        None,
    ]


def test_credentials_are_hidden_and_tokens_of_language_are_not() -> None:
    config = "api_key: sk-1\n  HF_TOKEN: hf_x\neos_token: </s>\nmax_tokens: 20\n  password: 'x'\n"
    shown = without_credentials(config)
    assert shown == "api_key: (hidden)\n  HF_TOKEN: (hidden)\neos_token: </s>\nmax_tokens: 20\n  password: (hidden)\n"


def test_messages_read_as_text() -> None:
    assert (
        plain([{"role": "user", "content": "tea ?"}, {"role": "assistant", "content": "hot"}])
        == "user: tea ?\nassistant: hot"
    )
