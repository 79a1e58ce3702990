"""Every format gives the same rows, each in its place; what is wrong is said where it is."""

from __future__ import annotations

import datetime
import decimal
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from klimb.data.formats import read_rows
from klimb.data.readers import open_source
from klimb.errors import DataError

FUZZ = settings(max_examples=200, deadline=None, derandomize=True, database=None)
ROWS = [{"prompt": 'a "b", c\nd', "completion": "é\u2028"}, {"prompt": "e;f\t", "completion": ""}]
CSV = 'prompt,completion\r\n"a ""b"", c\nd",é\u2028\r\n"e;f\t",\r\n'


def write(path: Path, data: str | bytes) -> Path:
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def save(folder: Path, form: str, rows: list[dict[str, Any]]) -> Path:
    """The rows in a file (or folder) of this form."""
    path = folder / f"rows.{form}"
    if form.startswith("parquet"):
        parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=3)
    elif form == "saved":
        Dataset.from_list(rows).save_to_disk(path, num_shards=2)
    else:
        data = json.dumps(rows, indent=2) if "json." in form + "." else "".join(json.dumps(r) + "\n" for r in rows)
        write(path, gzip.compress(data.encode()) if form.endswith(".gz") else data)
    return path


@pytest.mark.parametrize("form", ["jsonl", "jsonl.gz", "json", "json.gz", "parquet", "saved"])
def test_every_format_gives_the_same_rows(tmp_path: Path, form: str) -> None:
    rows = [{"prompt": f"é {n}\n", "n": n, "x": [{"y": 0.5, "z": None}]} for n in range(7)]
    read, problems = read_rows(save(tmp_path, form, rows))
    assert [row.values for row in read] == rows
    assert problems == []
    assert len({row.where for row in read}) == 7


def test_places(tmp_path: Path) -> None:
    rows = [{"prompt": "a"}, {"prompt": "b"}]
    path = write(tmp_path / "list.json", '[\n\n{"prompt":\n"a"},\n {"prompt": "b"}\n]')
    assert [row.where for row in read_rows(path)[0]] == [f"{path}:3", f"{path}:5"]
    path = write(tmp_path / "table.csv", CSV)
    assert [row.where for row in read_rows(path)[0]] == [f"{path}:2", f"{path}:4"]
    path = save(tmp_path, "parquet", rows)
    assert [row.where for row in read_rows(path)[0]] == [f"{path}[0]", f"{path}[1]"]


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.csv", CSV), ("a.csv.gz", gzip.compress(CSV.encode(), mtime=0)), ("a.csv", "\ufeff" + CSV),
        ("a.csv", 'prompt;completion\n"a ""b"", c\nd";é\u2028\n"e;f\t";\n'),
        ("a.tsv", 'prompt\tcompletion\n"a ""b"", c\nd"\té\u2028\n\n"e;f\t"\t\n'),
        ("a.csv", ',prompt,completion\n0,"a ""b"", c\nd",é\u2028\n1,"e;f\t",'),  # an index, and no end of line
    ],
)  # fmt: skip
def test_csv(tmp_path: Path, name: str, data: str | bytes) -> None:
    rows, problems = read_rows(write(tmp_path / name, data))
    assert [row.values for row in rows] == ROWS
    assert problems == []


def test_csv_rows_that_are_none(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", b'prompt,answer\na,b\nc\nd,e,f\n\xff,g\nh,i\nj,"k\nl,m\n')
    rows, problems = read_rows(path)
    assert [list(row.values.values()) for row in rows] == [["a", "b"], ["h", "i"]]
    assert [(p.where, p.reason.split(" (")[0]) for p in problems] == [
        (f"{path}:3", "has 1 cells where the first line names 2 columns"),
        (f"{path}:4", "has 3 cells where the first line names 2 columns"),
        (f"{path}:5", "is not UTF-8"),
        (f"{path}:7", "malformed CSV: unexpected end of data"),
    ]
    with pytest.raises(DataError, match="two columns are called 'a'"):
        read_rows(write(tmp_path / "b.csv", "a,a\n1,2\n"))


def test_a_long_cell_is_no_problem(tmp_path: Path) -> None:
    [row], _ = read_rows(write(tmp_path / "a.csv", "text\n" + "x" * 300_000 + "\n"))
    assert len(row.values["text"]) == 300_000


def test_json_rows_that_are_none(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", '[{"a": 1},\n{"a": NaN},\n{"a": 1, "a": 2},\n3,\n{"a": "\\ud800"},\n{"a": 2}]\n')
    rows, problems = read_rows(path)
    assert [row.values for row in rows] == [{"a": 1}, {"a": 2}]
    assert [p.where for p in problems] == [f"{path}:{line}" for line in (2, 3, 4, 5)]
    assert [p.reason.split(" (")[0] for p in problems] == [
        "NaN is not JSON", "the key 'a' occurs twice", "is a int, not an object of columns", "has half a character",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ('{"data": [{"a": 1}], "n": 3}', "holds no list of rows: its key 'data' holds one"),
        ('{\n"a": 1}', "holds no list"), ("3", "holds no list"), ("", "holds no list"), ("nonsense", "holds no list"),
        ('[{"a": 1},\n{"a": ', ":2: malformed JSON: Expecting value; is the file cut off"),
        ('[{"a": 1},\n{"a": 2}', ":2: malformed JSON: no comma and no ]"), ('[{"a": 1} {"a": 2}]', "no comma and no ]"),
        ('[{"a": 1},]', "malformed JSON"), ('[{"a": 1}] 3', "'3' follows the list"), (b'["\xff"]', "is not UTF-8"),
        ("[" * 100_000, "malformed JSON: nested"), ("[]", "no rows"),
    ],
)  # fmt: skip
def test_json_that_is_no_list_of_rows(tmp_path: Path, data: str | bytes, said: str) -> None:
    with pytest.raises(DataError, match=said.replace("]", r"\]")):
        read_rows(write(tmp_path / "a.json", data))


def test_json_lines_under_the_name_of_json(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", '\n{"a": 1}\n{"a": NaN}\n{"a": 2}\n')
    rows, problems = read_rows(path)
    assert [row.where for row in rows] == [f"{path}:2", f"{path}:4"]
    assert [problem.where for problem in problems] == [f"{path}:3"]


def test_what_tables_hold_becomes_what_json_can_hold(tmp_path: Path) -> None:
    odd = {"day": datetime.date(2024, 1, 2), "price": decimal.Decimal("1.50"), "image": b"abc", "nothing": None}
    [row], _ = read_rows(save(tmp_path, "parquet", [odd]))
    assert row.values == {"day": "2024-01-02", "price": "1.50", "image": "<3 bytes>", "nothing": None}


@pytest.mark.parametrize("part", [0.0, 0.3, 0.9, 0.999])
def test_a_table_that_is_cut_off(tmp_path: Path, part: float) -> None:
    for form in ("parquet", "saved"):
        path = save(tmp_path, form, [{"prompt": "a" * n} for n in range(99)])
        file = path if form == "parquet" else sorted(path.glob("*.arrow"))[1]
        file.write_bytes(file.read_bytes()[: int(file.stat().st_size * part)])
        with pytest.raises(DataError, match=r"rows\.(parquet|saved): is damaged or cut off"):
            read_rows(path)


def test_folders(tmp_path: Path) -> None:
    rows = [{"prompt": "a"}]
    parts = DatasetDict(train=Dataset.from_list(rows), test=Dataset.from_list([{"prompt": "b"}]))
    parts.save_to_disk(tmp_path / "both")
    assert read_rows(tmp_path / "both")[0][0].where == f"{tmp_path}/both/train[0]"
    assert read_rows(tmp_path / "both" / "test")[0][0].values == {"prompt": "b"}
    DatasetDict(test=Dataset.from_list(rows)).save_to_disk(tmp_path / "one")
    with pytest.raises(DataError, match=r"no split train; name one of its splits: .*one/test"):
        read_rows(tmp_path / "one")
    write(tmp_path / "a.jsonl", "")
    with pytest.raises(DataError, match=r"is a directory, and none of `datasets`; name a file in it: a\.jsonl"):
        read_rows(tmp_path)
    write(tmp_path / "one" / "test" / "state.json", '{"_data_files": [{"filename": "../../a.jsonl"}]}')
    with pytest.raises(DataError, match="is damaged"):  # and not read from elsewhere
        read_rows(tmp_path / "one" / "test")


def test_rows_from_python() -> None:
    rows = [{"prompt": "a"}, {"prompt": "b"}]
    for source in (rows, tuple(rows), iter(rows), (row for row in rows), Dataset.from_list(rows)):
        read, problems = read_rows(source)
        assert [(row.where, row.values) for row in read] == [("rows[0]", rows[0]), ("rows[1]", rows[1])]
        assert problems == []


def test_a_file_that_grows_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"prompt": "a"}\n' * 3)
    opened = open_source(path)
    next(opened.pairs)
    with path.open("a") as file:
        file.write('{"prompt": "b"}\n')
    with pytest.raises(DataError, match="was changed while it was read"):
        list(opened.pairs)


def test_the_identity_is_that_of_the_content_and_of_how_it_is_read(tmp_path: Path) -> None:
    rows = [{"prompt": "a"}, {"prompt": "b"}]
    paths = [save(tmp_path, form, rows) for form in ("jsonl", "json", "parquet", "saved")]
    paths += [write(tmp_path / "as.json", paths[0].read_bytes()), write(tmp_path / "as.csv", paths[0].read_bytes())]
    identities = [open_source(path).identity() for path in paths]
    assert len({*identities}) == 6
    again = write(tmp_path / "again.jsonl", paths[0].read_bytes())
    assert open_source(again).identity() == identities[0]
    assert open_source(rows).identity() is None


@FUZZ
@given(st.sampled_from(["json", "csv", "tsv", "parquet"]), st.data())
def test_damaged_files_end_in_rows_problems_or_one_error(
    tmp_path_factory: pytest.TempPathFactory, form: str, data: st.DataObject
) -> None:
    folder = tmp_path_factory.getbasetemp()
    rows = [{"prompt": 'a, "b"\n', "n": "1"}] * 3
    if form in ("csv", "tsv"):
        path = write(folder / f"fuzz.{form}", 'prompt,n\n"a, ""b""\n",1\nc,2\n')
    else:
        path = save(folder, form, rows)
    whole = bytearray(path.read_bytes())
    for at, byte in data.draw(st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), max_size=4)):
        whole[at % len(whole)] = byte
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole)))])
    said = ""
    try:
        read, problems = read_rows(path)
    except DataError as error:
        said = str(error)
    assert str(path) in said or len(read) + len(problems) > 0
