"""Queries by execution."""

import sqlite3
import time
from contextlib import closing
from pathlib import Path

import pytest

from klimb.rewards.spec import parse_reward
from klimb.rewards.verifiers.sql import is_ordered, opened, rows_of, sql

SHOP = """
CREATE TABLE item (id INTEGER PRIMARY KEY, name TEXT, price REAL);
INSERT INTO item VALUES (1, 'tea', 2.5), (2, 'milk', 1.5), (3, 'jam', 2.5);
"""
FOREVER = "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT count(*) FROM n"


@pytest.mark.parametrize(
    ("query", "reference", "score"),
    [
        ("SELECT name FROM item", "SELECT name FROM item ORDER BY id", 1.0),
        ("SELECT name FROM item ORDER BY name", "SELECT name FROM item ORDER BY id", 0.0),
        ("SELECT name FROM item ORDER BY name", "SELECT name FROM item", 1.0),
        ("```sql\nSELECT max(price) FROM item;\n```", "SELECT 2.5", 1.0),
        ("SELECT price FROM item", "SELECT DISTINCT price FROM item", 0.0),  # rows count as often as they occur
        ("SELECT name AS n FROM item", "SELECT name FROM item", 1.0),
        ("SELECT name, id FROM item", "SELECT id, name FROM item", 0.0),
        ("SELECT sum(price) / 3 FROM item", "SELECT avg(price) FROM item", 1.0),
        ("SELECT '3'", "SELECT count(*) FROM item", 0.0),
        ("SELECT 3.0", "SELECT count(*) FROM item", 1.0),
        ("SELECT name FROM items", "SELECT name FROM item", 0.0),
        ("SELECT name FROM item; SELECT 1", "SELECT name FROM item", 0.0),
        ("I do not know.", "SELECT name FROM item", 0.0),
        ("", "SELECT name FROM item", 0.0),
        ("SELECT 1 WHERE 0", "SELECT name FROM item WHERE id > 9", None),  # says nothing about a query
    ],
)
def test_results_are_compared(query: str, reference: str, score: float | None) -> None:
    assert sql().score(query, reference, SHOP) == score


def test_several_references_and_none() -> None:
    assert sql().score("SELECT 2", ["SELECT 1", "SELECT 2"], SHOP) == 1.0
    assert sql().score("SELECT 2", None, SHOP) is None
    assert sql().score("SELECT 2", "SELECT 2", None) is None


@pytest.mark.parametrize(
    ("query", "ordered"),
    [
        ("select a from t order  by a", True),
        ("select a from (select a from t order by a)", False),
        ("select 'order by' from t -- order by a", False),
        ("select a from t /* order by */", False),
        ('select "order by" from t', False),
    ],
)
def test_order_counts_where_the_outermost_query_asks_for_it(query: str, ordered: bool) -> None:
    assert is_ordered(query) is ordered


FORBIDDEN = [
    "INSERT INTO item VALUES (4, 'x', 1)", "DELETE FROM item", "UPDATE item SET price = 0", "DROP TABLE item",
    "CREATE TABLE t (x)", "CREATE TEMP TABLE t AS SELECT 1", "ATTACH DATABASE '/tmp/klimb-escape.db' AS e",
    "PRAGMA writable_schema = 1", "VACUUM INTO '/tmp/klimb-escape.db'", "BEGIN", "SELECT load_extension('x')",
    "SELECT readfile('/etc/passwd')", "SELECT length(zeroblob(1000000000))",
]  # fmt: skip


@pytest.mark.parametrize("query", FORBIDDEN)
def test_a_query_can_read_and_nothing_else(query: str, tmp_path: Path) -> None:
    path = tmp_path / "shop.db"
    with closing(sqlite3.connect(path)) as made:
        made.executescript(SHOP)
    before = path.read_bytes()
    for database in (SHOP, str(path)):
        with closing(opened(database)) as connection:
            with pytest.raises((sqlite3.Error, sqlite3.Warning)):
                rows_of(connection, query)
            assert rows_of(connection, "SELECT count(*) FROM item") == [(3,)]
    assert path.read_bytes() == before
    assert not Path("/tmp/klimb-escape.db").exists()


@pytest.mark.usefixtures("nothing_left")
def test_endings_are_counted_and_a_query_that_never_ends_is_stopped() -> None:
    reward = parse_reward({"sql": {"timeout": 2.0}})
    texts = ["SELECT 1", FOREVER, "SELECT 2", "SELECT 1", "SELECT 1", "SELECT 1"]
    references = ["SELECT 1", "SELECT 1", "SELECT 1", None, FOREVER, "SELECT 1"]
    started = time.monotonic()
    scores = reward(["p"] * 6, texts, {"answer": references, "database": [SHOP] * 5 + ["no script"]})
    reward.close()
    assert time.monotonic() - started < 60  # two deadlines and the start of another process, on a busy machine
    assert scores.values == [1.0, 0.0, 0.0, None, None, None]
    assert scores.counts == {"ok": 1, "wrong": 1, "abstain": 1, "timeout": 1, "error": 2}
    assert "the reference query in column 'answer' fails: interrupted" in scores.failures[0].reason
    assert "neither a file nor a script" in scores.failures[1].reason


def test_large_results_and_texts_are_bounded() -> None:
    started = time.process_time()
    endless = FOREVER.replace("count(*)", "x")
    assert sql().score(endless, "SELECT 1", SHOP) == 0.0
    assert sql().score("SELECT " + "(" * 1_000_000, "SELECT 1", SHOP) == 0.0
    assert sql().score("SELECT 1" + " " * 1_000_000 + "+ 0", "SELECT 1", SHOP) == 0.0
    assert time.process_time() - started < 5.0  # 0.2 s when it was written
