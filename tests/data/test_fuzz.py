"""A part of the fuzz run (`python tests/data/fuzz.py` is all of it), and what its figures rest on."""

from __future__ import annotations

import gzip
import tracemalloc
from pathlib import Path

import fuzz
import pytest

from klimb.data.formats import read_rows
from klimb.data.source import MAX_ROW


@pytest.mark.parametrize("part", range(5))
def test_every_row_of_a_damaged_file_is_accepted_or_reported(tmp_path: Path, part: int) -> None:
    for index in range(part * 30, (part + 1) * 30):
        file = fuzz.make_file(tmp_path, index, seed=0)
        try:
            fuzz.check(file)
        except Exception as error:
            raise AssertionError(f"file {index}, {file.path.name} of {file.kind}, {file.faults}") from error


def test_a_lost_row_and_a_row_too_many_would_be_noticed(tmp_path: Path) -> None:
    file = next(
        file
        for file in (fuzz.make_file(tmp_path, index, seed=0) for index in range(100))
        if file.path.name == "rows.jsonl" and "NaN literal" in file.faults
    )
    fuzz.check(file)
    *_, bad = (where for where, verdict in file.verdicts.items() if verdict == "bad")
    file.verdicts[bad] = "good"
    with pytest.raises(AssertionError, match="is good"):
        fuzz.check(file)
    file.verdicts[bad] = "bad"
    file.verdicts[f"{file.path}:9999"] = "good"
    with pytest.raises(AssertionError, match="rows of"):
        fuzz.check(file)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.csv"])
def test_a_line_of_100_mb_is_one_bad_row_and_never_held(tmp_path: Path, name: str) -> None:
    first, last = ("prompt", '"b"') if name == "a.csv" else ('{"prompt": "a"}', '{"prompt": "b"}')
    data = f"{first}\n".encode() + b"x" * fuzz.HUGE + f"\n{last}\n".encode()
    path = tmp_path / name
    path.write_bytes(gzip.compress(data, 1) if name.endswith(".gz") else data)
    del data
    tracemalloc.start()
    rows, problems = read_rows(path)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert [problem.where for problem in problems] == [f"{path}:2"]
    assert "is longer than 16 MiB" in problems[0].reason
    assert rows[-1].values == {"prompt": "b"}
    # The piece that is read, its characters and the next piece: a fraction of the line.
    assert most < 4 * MAX_ROW < fuzz.HUGE
