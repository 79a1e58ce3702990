from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from klimb.errors import ConfigError, DataError
from klimb.lab import digits
from klimb.lab.digits import Calculation, calculate, calculations, marked, synthetic

GSM8K = Path(__file__).parents[3] / "shared" / "data" / "gsm8k" / "train.jsonl.gz"
needs_gsm8k = pytest.mark.skipif(not GSM8K.exists(), reason="GSM8K is not in the sibling folder shared/data")


def rows_of(path: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def number(text: str) -> int:
    """The value of digits with the least significant first, by place value."""
    return sum(int(digit) * 10**place for place, digit in enumerate(text))


def read_back(prompt: str, answer: str) -> tuple[int, str, int, int]:
    assert (len(prompt), len(answer), prompt[7]) == (8, 4, "=")
    return number(prompt[:3]), prompt[3], number(prompt[4:7]), number(answer)


def is_true(left: int, operation: str, right: int, result: int) -> bool:
    """By the inverse operation where there is one, so that a mistake in the operation itself is seen."""
    return {
        "+": result - right == left,
        "-": result + right == left,
        "*": sum(left for _ in range(right)) == result,
        "/": right > 0 and result * right == left,
    }[operation]


@pytest.fixture(scope="module")
def known() -> list[Calculation]:
    """All additions and subtractions of numbers below 40, and the products and quotients among them."""
    pairs = [(a, o, b) for a in range(40) for b in range(1, 40) for o in "+-*/"]
    return [item for pair in pairs if (item := calculate(*pair))]


def test_representation() -> None:
    quarter = calculate(48, "/", 2)
    assert quarter == (48, "/", 2, 24)
    assert (quarter.prompt, quarter.answer) == ("840/200=", "4200")
    product = calculate(999, "*", 10)
    assert product is not None
    assert (product.prompt, product.answer) == ("999*010=", "0999")


@pytest.mark.parametrize(
    ("left", "operation", "right"),
    [(1000, "+", 1), (1, "+", 1000), (3, "-", 5), (5, "/", 0), (7, "/", 2), (999, "*", 11)],
)
def test_out_of_bounds(left: int, operation: str, right: int) -> None:
    assert calculate(left, operation, right) is None


def test_extraction_leaves_out_what_is_not_exactly_one_true_operation() -> None:
    solution = (
        "She has 3+5 = <<3+5=8>>8, again <<3+5=8>>8, turned <<5+3=8>>8, padded <<03+5=8>>8.\n"
        "Wrong <<3+5=9>>9, two <<1+2+3=6>>6, decimal <<0.5*4=2>>2, rounded <<7/2=3>>3, "
        "money <<2*5=10.00>>10, negative <<3-5=-2>>, none <<12=12>>, unmarked 4+4=8\n#### 8"
    )
    assert len(marked([solution])) == 11
    assert calculations(marked([solution])) == [(3, "+", 5, 8), (5, "+", 3, 8)]


def test_both_orders_of_a_sum_fall_into_one_part(known: list[Calculation]) -> None:
    for item in known:
        if item.operation in "+*":
            turned = calculate(item.right, item.operation, item.left)
            assert turned is not None
            assert turned.part == item.part
    assert Calculation(5, "-", 3, 2).canonical != Calculation(3, "-", 5, 0).canonical


def test_shares_of_the_split(known: list[Calculation]) -> None:
    distinct = {item.canonical: item.part for item in known}
    counts = Counter(distinct.values())
    # Four standard errors of a share of about 2,700 distinct expressions.
    for part, share in {"test": 0.2, "validation": 0.1, "operands": 0.2, "prompts": 0.5}.items():
        error = (share * (1 - share) / len(distinct)) ** 0.5
        assert counts[part] / len(distinct) == pytest.approx(share, abs=4 * error)  # type: ignore[index]


def test_split_is_the_same_for_ever() -> None:
    # By sha256sum: "3+5" is 5e251f…, so at 0x5e/256 = .37; "48/2" is 23c6d9…, at .14.
    assert Calculation(5, "+", 3, 8).part == "operands"
    assert Calculation(48, "/", 2, 24).part == "test"


def test_synthetic_is_true_and_keeps_back_what_is_asked_later(known: list[Calculation]) -> None:
    made = synthetic(3000, known, seed=0)
    assert made == synthetic(3000, known, seed=0)
    assert made != synthetic(3000, known, seed=1)
    asked_later = {item.canonical for item in known if item.part != "operands"}
    assert len(asked_later) > 1000
    assert not asked_later & {item.canonical for item in made}
    assert all(is_true(*item) for item in made)
    shares = Counter(item.operation for item in made)
    # 2:2:1:1; four standard errors of a third of 3,000 are .035, of a sixth .027.
    for operation, share in {"+": 1 / 3, "-": 1 / 3, "*": 1 / 6, "/": 1 / 6}.items():
        assert shares[operation] / 3000 == pytest.approx(share, abs=0.035)
    operands = {x for item in known if item.part == "operands" for x in (item.left, item.right)}
    assert {x for item in made for x in (item.left, item.right)} <= operands
    assert {item.operation for item in synthetic(100, known, seed=0, operations="+-")} == {"+", "-"}


def gsm8k_like(path: Path, known: list[Calculation]) -> str:
    """A file in GSM8K's form in which every calculation stands once, four to a solution."""
    marks = [f"so <<{a}{o}{b}={c}>>{c}" for a, o, b, c in known]
    solutions = ["\n".join(marks[i : i + 4]) + "\n#### 1" for i in range(0, len(marks), 4)]
    path.write_text("".join(json.dumps({"question": "?", "answer": text}) + "\n" for text in solutions))
    return str(path)


def test_prepare(tmp_path: Path, known: list[Calculation], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digits, "DEMONSTRATIONS", 600)
    monkeypatch.setattr(digits, "FURTHER", 400)
    data = gsm8k_like(tmp_path / "g.jsonl", known)
    paths = digits.prepare(tmp_path / "w", data=data, seed=0, operations="+-")

    demonstrations, further = rows_of(paths["demonstrations"]), rows_of(paths["control_synthetic"])
    assert (len(demonstrations), len(further)) == (600, 400)
    taught = [(row["prompt"], row["completion"]) for row in demonstrations + further]

    parts = {name: rows_of(paths[name]) for name in ("prompts", "validation", "test")}
    asked = [(row["prompt"], row["answer"]) for rows in parts.values() for row in rows]
    plus_minus = [item for item in known if item.operation in "+-"]
    kept = [(item.prompt, item.answer) for item in plus_minus if item.part != "operands"]
    assert sorted(asked) == sorted(kept), "a calculation was lost or stands in two parts"
    assert not set(taught) & set(asked)
    assert all(is_true(*read_back(prompt, answer)) for prompt, answer in taught + asked)
    assert all(row["operation"] == row["prompt"][3] for rows in parts.values() for row in rows)

    control = [(row["prompt"], row["completion"]) for row in rows_of(paths["control"])]
    assert control == [(row["prompt"], row["answer"]) for row in parts["prompts"]]
    assert paths["reward"] == "exact"
    assert f"{len(known):,} calculations marked, {len(plus_minus):,} distinct ones used" in paths["summary"]

    tokenizer = AutoTokenizer.from_pretrained(paths["model"])
    ids = tokenizer(demonstrations[0]["prompt"]).input_ids
    assert len(ids) == 9
    assert tokenizer.decode(ids, skip_special_tokens=True) == demonstrations[0]["prompt"]
    model = AutoModelForCausalLM.from_pretrained(paths["model"])
    assert sum(weight.numel() for weight in model.parameters()) == pytest.approx(340_000, rel=0.02)


def test_bad_input(tmp_path: Path, known: list[Calculation]) -> None:
    with pytest.raises(ConfigError, match="operations='%'"):
        digits.prepare(tmp_path / "w", data="x.jsonl", seed=0, operations="%")
    with pytest.raises(DataError, match="no such file"):
        digits.prepare(tmp_path / "w", data="x.jsonl", seed=0)
    (tmp_path / "a.jsonl").write_text('{"answer": "<<1+1=2>>"}\n{"solution": "<<1+1=2>>"}\n')
    with pytest.raises(DataError, match=r'a\.jsonl:2: has no text in column "answer"'):
        digits.prepare(tmp_path / "w", data=str(tmp_path / "a.jsonl"), seed=0)
    (tmp_path / "b.jsonl").write_text('{"answer": "<<1+1=2>>"}\n')
    with pytest.raises(DataError, match="no calculation for the part"):
        digits.prepare(tmp_path / "w", data=str(tmp_path / "b.jsonl"), seed=0)
    assert not (tmp_path / "w").exists()
    with pytest.raises(DataError, match="no calculation with '/' can be made up"):
        synthetic(1, [item for item in known if item.operation == "+" and item.part == "test"], 0, "/")


@needs_gsm8k
def test_counts_on_gsm8k() -> None:
    with gzip.open(GSM8K, "rt", encoding="utf-8") as file:
        expressions = marked(json.loads(line)["answer"] for line in file)
    assert len(expressions) == 23_716
    found = calculations(expressions)
    assert len(found) == len(set(found)) == 5_227
    assert Counter(item.operation for item in found) == {"+": 1_676, "-": 1_571, "*": 1_326, "/": 654}
    assert all(is_true(*item) for item in found)
    assert Counter(item.part for item in found) == {
        "test": 1_047,
        "validation": 479,
        "operands": 1_076,
        "prompts": 2_625,
    }
