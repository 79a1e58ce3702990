"""Question answering and multiple choice."""

import random
import string
import time
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from klimb.rewards.rules import exact, normalised
from klimb.rewards.spec import parse_reward
from klimb.rewards.verifiers.answers import choice, chosen_letter, contains, f1

TEXTS = st.text(alphabet="ab the.,AB\n", max_size=30)


@pytest.mark.parametrize(
    ("text", "bare"),
    [
        ("The  Eiffel Tower!", "eiffel tower"),
        ("an A the", ""),
        ("theatre and anagram", "theatre and anagram"),
        ("U.S.A.", "usa"),
        ("it's\n3,000", "its 3000"),
        ("Ünïcode", "ünïcode"),
    ],
)
def test_texts_are_compared_without_case_punctuation_and_articles(text: str, bare: str) -> None:
    assert normalised(text) == bare


@given(TEXTS)
def test_a_normalised_text_stays_as_it_is(text: str) -> None:
    assert normalised(normalised(text)) == normalised(text)


def test_exact_match_of_normalised_texts() -> None:
    assert exact(normalise=True).score("The Tower.", "tower") == 1.0
    assert exact(normalise=True).score("Towers", ["tower", "the towers"]) == 1.0
    assert exact(normalise=True).score("Towers", "tower") == 0.0
    assert exact().score("The Tower.", "tower") == 0.0


def test_f1_by_hand() -> None:
    # given {in, paris, france}, wanted {paris}: precision 1/3, recall 1, F1 = 2·(1/3)·1 / (4/3)
    assert f1().score("in Paris, France", "Paris") == pytest.approx(0.5)
    assert f1().score("the cat the cat", "cat") == pytest.approx(2 / 3)  # twice said, once wanted: 2·1 / (2+1)
    assert f1().score("in Paris", ["London", "Paris in"]) == 1.0
    assert f1().score("", "Paris") == 0.0
    assert f1().score("The", "a") == 1.0  # nothing wanted, nothing said
    assert f1().score("x", None) is None


@given(TEXTS, TEXTS)
def test_f1_is_the_harmonic_mean_of_precision_and_recall(a: str, b: str) -> None:
    given_, wanted = normalised(a).split(), normalised(b).split()
    score = f1().score(a, b)
    assert score == f1().score(b, a)
    remaining, shared = Counter(wanted), 0
    for word in given_:
        if remaining[word] > 0:
            remaining[word] -= 1
            shared += 1
    if shared:
        precision, recall = shared / len(given_), shared / len(wanted)
        assert score == pytest.approx(2 * precision * recall / (precision + recall))
    else:
        assert score == float(not given_ and not wanted)


def test_contains_looks_for_whole_words() -> None:
    assert contains().score("It is the Eiffel Tower.", "eiffel tower") == 1.0
    assert contains().score("It is the Eiffel Towers.", "eiffel tower") == 0.0
    assert contains().score("Paris", ["London", "paris"]) == 1.0
    assert contains().score("x", None) is None
    with pytest.raises(ValueError, match="holds no word"):
        contains().score("x", "the")


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("The answer is B", "B"),
        ("the answer is (c)? No: answer: (C)", "C"),
        ("Answer: **D**", "D"),
        ("Answer: A. Because B is false and C is silly.", "A"),
        ("The answer is B because A is wrong and D is too", "B"),
        ("Final answer: A\nWait. Answer: B", "B"),
        (r"therefore \boxed{C}", "C"),
        (r"therefore \boxed{\text{C}}", "C"),
        ("so #### E", "E"),
        ("B", "B"),
        ("(B)", "B"),
        (" **B.** ", "B"),
        ("B) Paris", "B"),
        ("B. Paris, because A. London is in England", "B"),
        ("We compare them.\n\nC", "C"),
        ("A) London is too far. B) Paris fits.\nAnswer: option B", "B"),
        ("The correct choice is: D.", "D"),
        ("Answer: A", "A"),
        ("The answer is A because of that", "A"),
        # several, or none
        ("Answer: A, B, C, D", None),
        ("Answer: A or B", None),
        ("The answer is (A)(B)(C)(D)", None),
        ("Answer: A/B/C/D/E", None),
        ("A B C D", None),
        ("A, B, C and D", None),
        ("A) London\nB) Paris\nC) Rome\nD) Berlin", None),
        ("The answer is A dog", None),
        ("The answer is Dogs", None),
        ("A dog. I think", None),
        ("I think it is B, or C", None),
        ("b", None),
        ("", None),
        ("Answer:", None),
    ],
)
def test_the_letter_that_was_chosen(text: str, letter: str | None) -> None:
    assert chosen_letter(text, "ABCDE") == letter


def test_a_choice_is_held_against_a_letter_or_a_number() -> None:
    assert choice().score("Answer: B", "B") == 1.0
    assert choice().score("Answer: B", " (b) ") == 1.0
    assert choice().score("Answer: B", 1) == 1.0
    assert choice().score("Answer: B", 0) == 0.0
    assert choice().score("Answer: B", None) is None
    assert choice(letters="ABCDEFGHIJ").score("J", "J") == 1.0
    assert choice().score("J", ["A", "B"]) == 0.0
    for wrong in ("J", "AB", "", 5, -1, True):
        with pytest.raises(ValueError, match="is none of ABCDE"):
            choice().score("Answer: B", wrong)


@given(st.permutations("ABCDE"), st.sampled_from([", ", " ", "/", " or ", " and ", ") (", ""]))
def test_who_names_all_letters_has_chosen_none(letters: list[str], between: str) -> None:
    listed = between.join(letters)
    if between:
        assert chosen_letter(f"Answer: {listed}", "ABCDE") is None
    assert chosen_letter(listed, "ABCDE") is None


@given(st.text(alphabet="ABCDE ().:answer is\n*", max_size=60))
def test_at_most_one_reference_is_ever_satisfied(text: str) -> None:
    assert sum(choice().score(text, letter) == 1.0 for letter in "ABCDE") <= 1


def test_long_and_hostile_completions_are_bounded_in_time() -> None:
    stream = random.Random(0)
    noise = "".join(stream.choices(string.ascii_letters + " ().:\n", k=1_000_000))
    texts = [
        noise,
        "answer is " * 100_000,
        "Answer: " + "(" * 1_000_000,
        "A, " * 300_000,
        " " * 1_000_000,
        "#" * 1_000_000,
    ]
    for rule in (f1(), contains(), choice(), exact(normalise=True)):
        started = time.process_time()
        for text in texts:
            rule.score(text, "B")
        assert time.process_time() - started < 10.0, rule  # about 1 s when it was written


def test_verdicts_are_counted() -> None:
    reward = parse_reward("choice")
    scores = reward(["p"] * 4, ["B", "A", "B", "B"], {"answer": ["B", "B", None, "Z"]})
    reward.close()
    assert scores.values == [1.0, 0.0, None, None]
    assert scores.counts == {"ok": 1, "wrong": 1, "abstain": 1, "timeout": 0, "error": 1}
