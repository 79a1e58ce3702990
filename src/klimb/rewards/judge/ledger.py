"""Verdicts that were paid for, and what was spent: one SQLite file, so that nothing is asked or paid for twice."""

from __future__ import annotations

import sqlite3
import threading
from pathlib import Path
from typing import NamedTuple

from klimb.errors import RewardError
from klimb.rewards.judge.question import Verdict


class Spent(NamedTuple):
    """Requests, and tokens of prompts and of completions."""

    requests: int = 0
    prompt: int = 0
    completion: int = 0


class Ledger:
    """Held by one process, used by its threads. path None: in memory, for as long as the judge lives.

    Verdicts are kept, abstentions too (they cost as much); what failed is not. Neither questions, answers nor keys are.
    """

    def __init__(self, path: str | Path | None) -> None:
        self._lock = threading.Lock()
        try:
            self._file = sqlite3.connect(path or ":memory:", timeout=30.0, check_same_thread=False)
            self._file.execute("PRAGMA journal_mode = WAL")  # a kill loses nothing; each commit without waiting for
            self._file.execute("PRAGMA synchronous = NORMAL")  # the disk, which a power cut may cost the last few
            with self._file:
                self._file.execute("CREATE TABLE IF NOT EXISTS verdicts (key TEXT PRIMARY KEY, kind TEXT NOT NULL, "
                                   "value REAL, why TEXT NOT NULL, model TEXT NOT NULL)")  # fmt: skip
                self._file.execute("CREATE TABLE IF NOT EXISTS spent (requests INTEGER, prompt INTEGER, "
                                   "completion INTEGER)")  # fmt: skip
                if not self._file.execute("SELECT COUNT(*) FROM spent").fetchone()[0]:
                    self._file.execute("INSERT INTO spent VALUES (0, 0, 0)")
        except sqlite3.Error as error:
            raise RewardError("the judge's cache cannot be opened", where=path, why=error,
                              fix="name another with cache=FILE, or delete it") from None  # fmt: skip

    def get(self, key: str) -> Verdict | None:
        with self._lock:
            found = self._file.execute("SELECT kind, value, why FROM verdicts WHERE key = ?", (key,)).fetchone()
        return Verdict(*found) if found else None

    def put(self, key: str, verdict: Verdict, model: str) -> None:
        with self._lock, self._file:
            self._file.execute("INSERT OR REPLACE INTO verdicts VALUES (?, ?, ?, ?, ?)", (key, *verdict, model))

    def spend(self, requests: int = 0, prompt: int = 0, completion: int = 0) -> None:
        with self._lock, self._file:
            self._file.execute("UPDATE spent SET requests = requests + ?, prompt = prompt + ?, "
                               "completion = completion + ?", (requests, prompt, completion))  # fmt: skip

    @property
    def spent(self) -> Spent:
        with self._lock:
            return Spent(*self._file.execute("SELECT requests, prompt, completion FROM spent").fetchone())

    def close(self) -> None:
        with self._lock:
            self._file.close()
