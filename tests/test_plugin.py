"""Values out of people's own files."""

from __future__ import annotations

import subprocess
import sys

import pytest

from klimb.plugin import is_reference, load_attribute, source_hash, unknown_name


def test_what_is_a_reference():
    assert is_reference("rewards.py:score")
    assert is_reference("/some/where/my_file.py:MINE")
    assert not any(is_reference(text) for text in ("grpo", "rewards.py", "a:b", "rewards.py:not a name", "x.py:"))


def test_an_unchanged_file_is_run_once_and_an_edited_one_again(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("VALUE = object()\n")
    first, before = load_attribute(f"{file}:VALUE"), source_hash(f"{file}:VALUE")
    assert load_attribute(f"{file}:VALUE") is first
    file.write_text("VALUE = 2\n")
    assert load_attribute(f"{file}:VALUE") == 2
    assert source_hash(f"{file}:VALUE") != before


def test_two_files_of_one_name_do_not_meet(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.py").write_text("HERE = __file__\n")
    assert load_attribute(f"{tmp_path}/a/mine.py:HERE") != load_attribute(f"{tmp_path}/b/mine.py:HERE")


@pytest.mark.parametrize(
    ("source", "name", "message"),
    [
        ("def score(): ...\n", "scroe", "did you mean 'score'"),
        ("x = 1\ny = 1 / 0\n", "x", r"mine.py:2: running the file failed with ZeroDivisionError"),
        ("x = 1\n\nif :\n", "x", r"mine.py:3: running the file failed with SyntaxError"),
        ("import not_a_module_at_all\n", "x", "ModuleNotFoundError: No module named 'not_a_module_at_all'"),
    ],
)
def test_errors_name_the_place(tmp_path, source, name, message):
    file = tmp_path / "mine.py"
    file.write_text(source)
    for _ in range(2):  # a file that failed is not taken for loaded
        with pytest.raises(ValueError, match=message):
            load_attribute(f"{file}:{name}")


def test_what_points_nowhere(tmp_path):
    with pytest.raises(ValueError, match="there is no file"):
        load_attribute(f"{tmp_path}/gone.py:x")
    with pytest.raises(ValueError, match=r"path/to/file.py:NAME"):
        load_attribute("gone")


def test_swapped_letters_come_first():
    assert "did you mean 'grpo'" in str(unknown_name("algorithm: unknown", "gpro", ["gspo", "grpo", "ppo"]))
    assert "did you mean" not in str(unknown_name("algorithm: unknown", "zzz", ["gspo"]))


def test_it_needs_no_torch():
    code = "import sys, klimb.plugin; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
