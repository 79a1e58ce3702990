"""The samples table against pyarrow's own conversion."""

import subprocess
import sys

import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from klimb.runtime.samples import _COLUMNS, sample_table

VALUES = {
    pa.string(): st.text(),
    pa.int64(): st.integers(-(2**63), 2**63 - 1),
    pa.float64(): st.floats(allow_nan=False),
    pa.bool_(): st.booleans(),
    pa.list_(pa.int32()): st.lists(st.integers(0, 2**31 - 1), max_size=5),
    pa.list_(pa.float32()): st.lists(st.floats(width=32, allow_nan=False), max_size=5),
}


@settings(deadline=None)  # the first call loads Arrow
@given(
    st.lists(st.fixed_dictionaries({}, optional={k: st.none() | VALUES[t] for k, t in _COLUMNS.items()}), max_size=6)
)
def test_the_table_is_what_pyarrow_makes_of_the_rows(rows: list[dict[str, object]]) -> None:
    table = sample_table(7, [{**row, "reward.length": 0.5} for row in rows])
    table.validate(full=True)
    for name, kind in _COLUMNS.items():
        assert table[name].combine_chunks().equals(pa.array([row.get(name) for row in rows], type=kind)), name
    assert table["step"].to_pylist() == [7] * len(rows)
    if rows:
        assert table["reward.length"].to_pylist() == [0.5] * len(rows)
    assert table["gold"].null_count == len(rows)


def test_a_lone_surrogate_is_replaced_and_messages_become_json() -> None:
    table = sample_table(1, [{"completion": "a\ud800b"}, {"completion": [{"role": "user", "content": "ü"}]}])
    assert table["completion"].to_pylist() == ["a?b", '[{"role": "user", "content": "ü"}]']


def test_pandas_is_not_loaded() -> None:
    code = "import sys; from klimb.runtime.samples import sample_table; sample_table(1, [{'sample': 1}]); " \
           "sys.exit('pandas' in sys.modules)"  # fmt: skip
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
