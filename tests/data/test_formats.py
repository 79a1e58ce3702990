from __future__ import annotations

import gzip
import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from klimb.data import formats
from klimb.data.formats import BadRows, read_rows
from klimb.data.kinds import read_table
from klimb.errors import DataError

FUZZ = settings(max_examples=300, deadline=None, derandomize=True, database=None)

# (line, verdict): what the JSON standard and the rules of the reader say about it, "" for a row that is read.
LINES: list[tuple[bytes, str]] = [
    (b'{"prompt": "a"}', ""),
    (b'{"prompt": "a"}\r', ""),
    (b'  {"prompt": "a", "n": [1, 2.5e3, null, true]}  ', ""),
    ('{"prompt": "one\u2028line\u2029still\u0085"}'.encode(), ""),
    (b'{"prompt": "nul \\u0000"}', ""),
    (b'{"prompt": "pair \\ud83d\\ude00"}', ""),
    (b'{"prompt": "half \\ud83d"}', "surrogate"),
    (b'{"prompt": "a", "\\udc00": 1}', "surrogate"),
    (b'{"prompt": ["deep", {"x": "\\udfff"}]}', "surrogate"),
    (b'{"prompt": "raw nul \x00"}', "malformed"),
    (b'{"prompt": "latin \xe4"}', "UTF-8"),
    (b'{"prompt": NaN}', "NaN is not JSON"),
    (b'{"prompt": [-Infinity]}', "-Infinity is not JSON"),
    (b'{"prompt": 1e999}', "too large"),
    (b'{"prompt": 1' + b"0" * 5000 + b"}", "malformed"),
    (b'{"prompt": "a", "prompt": "b"}', "occurs twice"),
    (b'{"x": {"y": 1, "y": 1}}', "occurs twice"),
    (b'{"prompt": "a"', "malformed"),
    (b'{"prompt": "a",}', "malformed"),
    (b"{'prompt': 'a'}", "malformed"),
    (b'{"prompt": "a"}{"prompt": "b"}', "malformed"),
    (b'["prompt"]', "is a list"),
    (b'"prompt"', "is a str"),
    (b"null", "is a NoneType"),
    (b"[" * 10_000, "nested"),
    (b'{"x":' * 10_000 + b"1" + b"}" * 10_000, "nested"),
    (b'{"x":' + b"[" * 200 + b"]" * 200 + b"}", "nested"),
    (b"\xef\xbb\xbf{}", "malformed"),
    (b"", "blank"),
    (b" \t\r", "blank"),
]


def write(directory: Path, data: bytes, name: str = "data.jsonl") -> str:
    path = directory / name
    path.write_bytes(data)
    return str(path)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("formats")


@FUZZ
@given(st.lists(st.sampled_from(LINES), min_size=1, max_size=7), st.booleans())
def test_every_line_is_a_row_or_a_problem_at_its_place(
    scratch: Path, lines: list[tuple[bytes, str]], zipped: bool
) -> None:
    data = b'{"prompt": "first"}\n' + b"\n".join(line for line, _ in lines) + b"\n"
    path = write(scratch, gzip.compress(data) if zipped else data)
    rows, problems = read_rows(path)
    expected = {f"{path}:{number}": verdict for number, (_, verdict) in enumerate(lines, start=2)}
    assert [row.where for row in rows] == [
        f"{path}:1",
        *(at for at, verdict in expected.items() if not verdict),
    ]
    assert [p.where for p in problems] == [at for at, verdict in expected.items() if verdict not in ("", "blank")]
    for problem in problems:
        assert expected[problem.where] in problem.reason


@FUZZ
@given(
    st.lists(
        st.dictionaries(st.text(max_size=5), st.one_of(st.integers(), st.text(), st.booleans(), st.none()), max_size=3),
        min_size=1,
        max_size=4,
    ),
    st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=3),
)
def test_flipped_bytes_end_in_rows_or_problems_and_nothing_is_lost(
    scratch: Path, rows: list[dict[str, Any]], flips: list[tuple[int, int]]
) -> None:
    data = bytearray("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
    for position, byte in flips:
        data[position % len(data)] = byte
    assume(data[:2] != b"\x1f\x8b")
    lines = [line for line in bytes(data).split(b"\n") if line.strip()]
    path = write(scratch, bytes(data))
    if not lines:
        with pytest.raises(DataError, match="no rows"):
            read_rows(path)
        return
    read, problems = read_rows(path)
    assert len(read) + len(problems) == len(lines)
    if not flips:
        assert [row.values for row in read] == rows


def test_a_bom_is_tolerated_at_the_start_alone(tmp_path: Path) -> None:
    rows, problems = read_rows(write(tmp_path, b'\xef\xbb\xbf{"prompt": "a"}\r\n{"prompt": "b"}\r\n'))
    assert [row.values for row in rows] == [{"prompt": "a"}, {"prompt": "b"}]
    assert not problems


def test_a_cut_off_last_line_is_called_that(tmp_path: Path) -> None:
    _, problems = read_rows(write(tmp_path, b'{"prompt": "a"}\n{"prompt": "b'))
    assert problems[0].where.endswith(":2")
    assert "cut off" in problems[0].reason


def test_gzip_is_told_by_content_not_by_name(tmp_path: Path) -> None:
    plain = write(tmp_path, b'{"prompt": "a"}\n', "named.jsonl.gz")
    zipped = write(tmp_path, gzip.compress(b'{"prompt": "a"}\n'), "named.jsonl")
    assert [len(read_rows(path)[0]) for path in (plain, zipped)] == [1, 1]


@pytest.mark.parametrize("keep", [0.6, 0.95])
def test_a_truncated_gzip_is_an_error_that_names_the_row(tmp_path: Path, keep: float) -> None:
    data = gzip.compress("".join(json.dumps({"prompt": str(i * 7919)}) + "\n" for i in range(2000)).encode())
    path = write(tmp_path, data[: int(len(data) * keep)], "cut.jsonl.gz")
    with pytest.raises(DataError, match=r"cut\.jsonl\.gz:\d+: the gzip stream is damaged"):
        read_rows(path)


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("empty.jsonl", b"", "no rows"),
        ("blank.jsonl", b"\n \n", "no rows"),
        ("empty.jsonl.gz", gzip.compress(b"", mtime=0), "no rows"),
        ("table.csv", b"a,b\n", "no rows"),
        ("list.json", b"[]", "no rows"),
        ("table.parquet", b"PAR1", "damaged or cut off"),
        ("table.arrow", b"ARROW1", "not read"),
    ],
)
def test_sources_with_nothing_to_read(tmp_path: Path, name: str, data: bytes, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        read_rows(write(tmp_path, data, name))


def test_missing_files_and_directories(tmp_path: Path) -> None:
    for path in (tmp_path / "no.jsonl", "data/train.jsonl", "./a/b", "nothing"):
        with pytest.raises(DataError, match="no such file"):
            read_rows(path)
    with pytest.raises(DataError, match="is a directory"):
        read_rows(tmp_path)
    with pytest.raises(DataError, match="no rows"):
        read_rows([])


def test_python_rows_have_places_and_are_not_changed() -> None:
    source = [{"question": "a", "id": 1}, ["no row"], {"id": 2}, {"question": "\ud800"}, {1: 2}]
    rows, problems = read_rows(source, {"prompt": "question"})  # type: ignore[arg-type]
    assert [(row.where, row.values) for row in rows] == [("rows[0]", {"id": 1, "prompt": "a"})]
    assert [problem.where for problem in problems] == ["rows[1]", "rows[2]", "rows[3]", "rows[4]"]
    assert "no column 'question' (it has: id)" in problems[1].reason
    assert source[0] == {"question": "a", "id": 1}


def test_columns_can_be_swapped() -> None:
    rows, _ = read_rows([{"prompt": "b", "completion": "a"}], {"prompt": "completion", "completion": "prompt"})
    assert rows[0].values == {"prompt": "a", "completion": "b"}


def test_a_hub_name_is_loaded_by_datasets_and_a_path_wins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = []

    def load_dataset(name: str, config: str | None, split: str) -> list[dict[str, str]]:
        calls.append((name, config, split))
        if name == "nobody/nothing":
            raise FileNotFoundError("not\nfound")
        return [{"prompt": "a"}, {"prompt": "b"}]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.chdir(tmp_path)
    assert read_rows("openai/gsm8k/main:test")[0][1].where == "openai/gsm8k:test[1]"
    assert read_rows("openai/gsm8k")[0][0].where == "openai/gsm8k:train[0]"
    with pytest.raises(DataError, match="not found"):
        read_rows("nobody/nothing")
    assert calls == [
        ("openai/gsm8k", "main", "test"),
        ("openai/gsm8k", None, "train"),
        ("nobody/nothing", None, "train"),
    ]
    (tmp_path / "openai").mkdir()
    write(tmp_path / "openai", b'{"prompt": "local"}\n', "gsm8k")
    assert read_rows("openai/gsm8k")[0][0].values == {"prompt": "local"}


def test_bad_rows_are_listed_with_a_total() -> None:
    rows = [{"prompt": "a"}] * 3 + [{"prompt": n} for n in range(25)]
    with pytest.raises(BadRows) as caught:
        read_table(rows)
    first, *listed = str(caught.value).splitlines()
    assert first.startswith("rows: 25 of 28 rows cannot be used, the first: rows[3]: prompt is a int")
    assert len(listed) == formats.LISTED + 1
    assert listed[-1].strip() == "and 5 more"
    assert len(caught.value.problems) == 25


def test_one_reason_for_all_rows_is_said_once() -> None:
    with pytest.raises(BadRows) as caught:
        read_table([{"question": "a", "answer": "b"}] * 9)
    assert len(str(caught.value).splitlines()) == 1
    assert "question, answer" in str(caught.value)


def test_reading_needs_no_torch() -> None:
    code = "import klimb.data.kinds, klimb.data.load, klimb.data.sampler, sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
