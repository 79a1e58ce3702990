"""Ratings that a language model writes: what is expected of it, beside one text at a time through transformers."""

from __future__ import annotations

import string

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from klimb.batch import Row, TokenBatch
from klimb.lab.scratch import character_tokenizer, make_model
from klimb.models.backbone import Backbone
from klimb.models.faces import Policy, reward_scores
from klimb.models.load import load_causal
from klimb.models.rated import Place, WrittenRatings

NAMES = {"a:": (1.0, [0.0, 1.0, 10.0]), ", b:": (-0.5, [0.0, 1.0, 7.0, 100.0])}
TEXTS = ["what? it is", "why? no", "what? yes and no", "whose? yours", "who? you", "which? 7"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> str:
    tokenizer = character_tokenizer(string.printable[:95])
    return str(make_model(tmp_path_factory.mktemp("model"), tokenizer=tokenizer, architecture="llama", hidden=32,
                          layers=2, heads=2, mlp=64, context=128, seed=0))  # fmt: skip


def ids(directory: str, text: str) -> list[int]:
    return list(AutoTokenizer.from_pretrained(directory)(text, add_special_tokens=False)["input_ids"])


@pytest.fixture(scope="module")
def model(directory: str) -> WrittenRatings:
    network, _ = load_causal(directory, torch.device("cpu"), torch.float64)
    with torch.no_grad():
        network.get_output_embeddings().weight *= 4  # random weights as they come have hardly an opinion
    places = [
        Place(name.strip(", :"), weight, ids(directory, name), ratings, [ids(directory, f" {r:g}") for r in ratings])
        for name, (weight, ratings) in NAMES.items()
    ]
    end = AutoTokenizer.from_pretrained(directory).eos_token_id
    return WrittenRatings(Policy(Backbone(network), None), places, end)


def batch(directory: str, texts: list[str]) -> TokenBatch:
    """The second half of each is a completion."""
    rows = []
    for text in texts:
        tokens = ids(directory, text)
        rows.append([Row(tokens[:5], tokens[5:], [False] * len(tokens[5:]))])
    return TokenBatch.from_rows(rows, range(len(rows)), texts)


def by_hand(directory: str, model: WrittenRatings, text: str) -> tuple[float, list[float]]:
    """The score and the written ratings: each continuation on its own, its probability by the chain rule."""
    network = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64)
    network.load_state_dict(model.backbone.model.state_dict())
    tokenizer, score, written = AutoTokenizer.from_pretrained(directory), 0.0, []
    for (name, (weight, ratings)), behind in zip(NAMES.items(), (",", tokenizer.eos_token), strict=True):
        text += name
        logps = []
        for rating in ratings:
            whole = torch.tensor([ids(directory, f"{text} {rating:g}{behind}")])
            said = len(ids(directory, text))
            with torch.no_grad():
                each = network(whole).logits[0].log_softmax(-1)
            logps.append(sum(each[t - 1, whole[0, t]] for t in range(said, whole.shape[1])))
        shares = torch.stack(logps).softmax(0)
        score += weight * float(shares @ torch.tensor(ratings, dtype=torch.float64))
        written.append(ratings[int(shares.argmax())])
        text += f" {written[-1]:g}"
    return score, written


def test_the_score_is_what_is_expected_of_the_ratings(directory: str, model: WrittenRatings) -> None:
    together = batch(directory, TEXTS)
    scores, (expected, likeliest) = model(together), model.read(together)
    for row, text in enumerate(TEXTS):
        score, written = by_hand(directory, model, text)
        assert scores[row].item() == pytest.approx(score, rel=1e-9)
        assert likeliest[row].tolist() == written
    assert (likeliest[:, 0] > 0).any()  # what stands before the second rating is not always the first one of the list
    assert not torch.allclose(expected, likeliest, atol=1e-3)  # finer than the rating that is written


def test_the_split_changes_nothing(directory: str, model: WrittenRatings) -> None:
    together = batch(directory, TEXTS)
    whole, parts = (reward_scores(model, together, budget=budget) for budget in (8192, 12))
    assert torch.allclose(whole, parts, rtol=1e-10)


def test_what_is_marked_is_not_read(directory: str, model: WrittenRatings) -> None:
    """Rows to learn from have the right answer in them."""
    plain = batch(directory, TEXTS)
    answered = [
        [Row(row.prompt, [*row.completion, 3, 4, 5], [False] * len(row.completion) + [True] * 3)]
        for [row] in plain.rows
    ]
    found = model(TokenBatch.from_rows(answered, range(len(TEXTS)), TEXTS))
    assert torch.equal(found, model(plain))


def test_its_facts_make_it_anew(directory: str, model: WrittenRatings) -> None:
    again = WrittenRatings.of(model.policy, WrittenRatings.facts(model.places, model.end))
    assert torch.equal(again(batch(directory, TEXTS)), model(batch(directory, TEXTS)))
