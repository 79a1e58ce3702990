"""Text that others wrote (models above all) and numbers, as a page may show them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

_HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u115f\u1160\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f"
    "\ufeff\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f]"
)
_CREDENTIAL = re.compile(
    r"^(\s*(?:- )?[\w.-]*(?:api_key|secret|password|(?:hf|api|auth|access)_token)[\"']?\s*:\s*)\S.*$",
    re.IGNORECASE | re.MULTILINE,
)


def visible(text: str) -> str:
    """`text` with what a reader could not see (escape codes, bidi overrides, zero widths) made visible.

    Control characters become their pictures (ESC is ␛), all others their code point (⟨U+202E⟩); newlines and
    tabs stay. Idempotent. It does not escape HTML: the template engine does.
    """
    return _HIDDEN.sub(_picture, text)


def _picture(match: re.Match[str]) -> str:
    code = ord(match.group())
    if code < 0x20:
        return chr(0x2400 + code)
    return "␡" if code == 0x7F else f"⟨U+{code:04X}⟩"


def clipped(text: str, limit: int) -> str:
    """At most `limit` characters, and how many are missing."""
    return text if len(text) <= limit else f"{text[:limit]} … ({len(text) - limit:,} more characters)"


def plain(content: Any) -> str:
    """A prompt or completion, a string or messages, as one string."""
    if isinstance(content, list):
        return "\n".join(
            f"{turn.get('role', '')}: {turn.get('content', '')}" if isinstance(turn, dict) else str(turn)
            for turn in content
        )
    return content if isinstance(content, str) else str(content)


def without_credentials(yaml: str) -> str:
    """A configuration that can be attached to a bug report."""
    return _CREDENTIAL.sub(r"\1(hidden)", yaml)


def finite(value: Any) -> float | None:
    """The number, or None where there is none (missing, NaN, a string)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def number(value: float | None, decimals: int = 2) -> str:
    """A number with a real minus sign; a dash for nothing; never "−0.00"."""
    if value is None:
        return "–"
    written = f"{value:.{decimals}f}"
    return written.lstrip("-") if float(written) == 0 else written.replace("-", "−")


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def columns(rows: Sequence[Mapping[str, Any]], names: Sequence[str] = ()) -> str:
    """A table in plain columns: they survive a pipe, a log and NO_COLOR. names: default, those of the first row."""
    names = [*(names or rows[0])]
    lines = [names, *([cell(row.get(name)) for name in names] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(names))]
    return "\n".join("  ".join(text.ljust(w) for text, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def cell(value: Any) -> str:
    """A value as it stands in a table."""
    if value is None:
        return "–"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
