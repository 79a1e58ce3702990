"""Instruction checks: each kept and broken, and the rule that reads them from a column."""

import json
import time

import pytest

from klimb.rewards.spec import parse_reward
from klimb.rewards.verifiers.instructions import CHECKS, checked, instructions, sentences_of

CASES = {
    "keywords:existence": ({"keywords": ["sun", "blue sky"]}, "The Sun in a blue sky.", "The sunny blue sky."),
    "keywords:frequency": (
        {"keyword": "sea", "frequency": 2, "relation": "at least"}, "Sea and sea.", "Sea and seaside.",
    ),
    "keywords:forbidden_words": ({"forbidden_words": ["bad", "very ugly"]}, "A badge.", "It is Bad."),
    "keywords:letter_frequency": (
        {"letter": "z", "let_frequency": 2, "let_relation": "less than"}, "One z.", "Zig zag.",
    ),
    "length_constraints:number_words": ({"num_words": 3, "relation": "less than"}, "two words", "these three words"),
    "length_constraints:number_sentences": (
        {"num_sentences": 2, "relation": "at least"}, 'One. "Two?" ', "One sentence of 3.5 parts.",
    ),
    "length_constraints:number_paragraphs": ({"num_paragraphs": 2}, "one\n***\ntwo", "one\n\ntwo"),
    "length_constraints:nth_paragraph_first_word": (
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "Then"}, "One.\n\n*then* more.", "Then.\n\nMore then.",
    ),
    "detectable_content:number_placeholders": ({"num_placeholders": 2}, "[name] at [place]", "[name] at place"),
    "detectable_content:postscript": ({"postscript_marker": "P.P.S"}, "Bye.\nP. P. S. More", "Bye. PS: more"),
    "detectable_format:number_bullet_lists": ({"num_bullets": 2}, "* one\n- two\n**no**\n---", "* one\n- two\n* three"),
    "detectable_format:constrained_response": ({}, "My answer is maybe.", "My answer is perhaps."),
    "detectable_format:number_highlighted_sections": ({"num_highlights": 2}, "*one* and **two**", "*one* and ** **"),
    "detectable_format:multiple_sections": (
        {"section_spliter": "SECTION", "num_sections": 2}, "SECTION 1\na\nSECTION 2\nb", "SECTION 1\nand SECTION 2",
    ),
    "detectable_format:json_format": ({}, '```json\n{"a": [1]}\n```', "{'a': 1}"),
    "detectable_format:title": ({}, "<<On the sea>>\ntext", "<< >>\ntext"),
    "combination:two_responses": ({}, "one\n******\ntwo", "one\n******\none"),
    "combination:repeat_prompt": ({"prompt_to_repeat": "What is it?"}, "what is it? A bird.", "A bird. What is it?"),
    "startend:start_checker": ({"start_phrase": "Dear"}, "  dear all", "All dear"),
    "startend:end_checker": ({"end_phrase": "That is all."}, "So. That is all.\n", "That is all. So."),
    "startend:quotation": ({}, '"quoted"', '"'),
    "change_case:capital_word_frequency": (
        {"capital_frequency": 2, "capital_relation": "at least"}, "GO NOW", "GO Now",
    ),
    "change_case:english_capital": ({}, "LOUD, 3!", "LOUd"),
    "change_case:english_lowercase": ({}, "quiet, 3!", "quieT"),
    "punctuation:no_comma": ({}, "none; here", "one, here"),
}  # fmt: skip


def test_every_check_has_a_case() -> None:
    assert CASES.keys() == CHECKS.keys()


@pytest.mark.parametrize("name", CASES)
def test_a_check_tells_kept_from_broken(name: str) -> None:
    arguments, kept, broken = CASES[name]
    assert checked(name, arguments)(kept) is True
    assert checked(name, arguments)(broken) is False


@pytest.mark.parametrize(
    ("relation", "counts"), [("at least", [2, 3]), ("less than", [0, 1]), ("at most", [0, 1, 2]), ("exactly", [2])]
)
def test_relations(relation: str, counts: list[int]) -> None:
    check = checked("length_constraints:number_words", {"num_words": 2, "relation": relation})
    assert [n for n in range(4) if check("word " * n)] == counts


def test_sentences() -> None:
    assert sentences_of('He said "No!" and left. 3.5 km? Yes') == ['He said "No!', "and left.", "3.5 km?", "Yes"]
    assert sentences_of("") == []


CHECKED = [
    {"check": "punctuation:no_comma"},
    {"check": "length_constraints:number_words", "num_words": 2, "relation": "at least"},
]


def test_all_have_to_be_kept_or_the_share_counts() -> None:
    assert instructions().score("two words", CHECKED) == 1.0
    assert instructions().score("two, words", CHECKED) == 0.0
    assert instructions(partial=True).score("two, words", CHECKED) == 0.5
    assert instructions().score("two words", json.dumps(CHECKED)) == 1.0
    assert instructions().score("x", None) is None
    assert instructions().score("x", []) is None


def test_names_and_arguments_in_two_columns_as_in_ifeval() -> None:
    rule = instructions(column="instruction_id_list", arguments="kwargs")
    names = ["punctuation:no_comma", "keywords:existence"]
    arguments = [{"keywords": None, "num_words": None}, {"keywords": ["sea"], "num_words": None}]
    assert rule.columns == ("instruction_id_list", "kwargs")
    assert rule.score("the sea", names, arguments) == 1.0
    assert rule.score("the sun", names, arguments) == 0.0
    with pytest.raises(ValueError, match="2 instructions and 1 arguments"):
        rule.score("the sea", names, arguments[:1])


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ([{"check": "punctuation:no_commas"}], "unknown instruction .*did you mean 'punctuation:no_comma'"),
        ([{"check": "language:response_language", "language": "de"}], "unknown instruction 'language:"),
        ([{"check": "keywords:existence"}], "keywords:existence: missing a required argument: 'keywords'"),
        ([{"check": "punctuation:no_comma", "n": 1}], "got an unexpected keyword argument 'n'"),
        ([{"check": "length_constraints:number_words", "num_words": 3, "relation": "more"}], "relation is 'more'"),
        (["punctuation:no_comma"], "a list of {check: NAME, …} is wanted"),
        ([{"name": "punctuation:no_comma"}], "a list of {check: NAME, …} is wanted"),
    ],
)
def test_a_row_that_cannot_be_checked_is_an_error_of_that_row(entry: list, message: str) -> None:
    reward = parse_reward("instructions")
    scores = reward(["p"] * 2, ["a b", "a b"], {"instructions": [CHECKED, entry]})
    reward.close()
    assert scores.values == [1.0, None]
    assert scores.counts["error"] == 1
    with pytest.raises(ValueError, match=message):
        instructions().score("a b", entry)


@pytest.mark.parametrize("name", CASES)
def test_hostile_texts_are_bounded_in_time(name: str) -> None:
    check, started = checked(name, CASES[name][0]), time.process_time()
    for unit in ("a", " ", "\n", "*", "[", "<", "a. ", "SECTION ", "* ", '"', "\n \n", "<<", "*a", "P.", ".", "{"):
        check((unit * 200_000)[:200_000])
    for opened in ("<<", "*", "**", "[", '"', 'a. "', "SECTION "):
        check(opened + "a" * 200_000)
        check(opened + " " * 200_000)
    assert time.process_time() - started < 8.0  # 0.1 to 1 s when it was written; quadratic work takes minutes


def test_a_runaway_completion_follows_nothing() -> None:
    assert instructions().score("a b " * 100_000, CHECKED) == 0.0
