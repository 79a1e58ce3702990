"""Reward models of each kind: what they learn, what transformers makes of them, and what they pay in training."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pyarrow import parquet
from tiny import chat_model
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BartConfig,
    BertConfig,
    EncoderDecoderConfig,
    PreTrainedTokenizerFast,
    T5Config,
)
from world import LETTERS, SMALL_RL, WORDS, Played, World, klimb, play, write

from klimb.batch import Row, TokenBatch
from klimb.data.render import Renderer
from klimb.errors import ConfigError, KlimbError
from klimb.models.backbone import Backbone
from klimb.models.encoder import EncoderReward, is_encoder, load_encoder
from klimb.models.load import load_classifier
from klimb.models.place import load_tokenizer
from klimb.rewards.model import ModelReward
from klimb.stages.experience import by_token
from klimb.stages.reward_kinds import in_order, process
from klimb.types import Judged, Sample, Segment
from klimb.watch.statistics import mean_interval, tally_interval

ASK = [f"{letter} ?" for letter in LETTERS]


def facts(done: Played) -> dict[str, Any]:
    return dict(json.loads((Path(done.model) / "reward.json").read_text()))


def by_transformers(model: str, texts: list[str]) -> torch.Tensor:
    """[N, K]: one text at a time, as somebody without klimb would."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    classifier = AutoModelForSequenceClassification.from_pretrained(model)
    with torch.no_grad():
        return torch.cat([classifier(**tokenizer(text, return_tensors="pt")).logits for text in texts])


def test_rankings_are_learnt_all_pairs_at_once(world: World, tmp_path: Path) -> None:
    rows = [{"prompt": ask, "completions": ["yes yes", "yes no", "no no"], "ranks": [1, 2, 3]} for ask in ASK]
    done = play("reward", tmp_path / "run", model=world.model, data=write(tmp_path / "r.jsonl", rows), kind="rankings",
                steps=30, batch_size=4, eval_fraction=0.4)  # fmt: skip
    assert done.rows[0]["loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert done.rows[-1]["loss"] < 0.2
    assert done.result["accuracy"] > 0.95
    best, middle, worst = by_transformers(done.model, ["a ? yes yes <eos>", "a ? yes no <eos>", "a ? no no <eos>"])
    assert best > middle > worst
    assert facts(done).keys() == {"mean", "std"}


def test_soft_labels_leave_the_scores_nearer(world: World, tmp_path: Path) -> None:
    def gap(strength: float) -> float:
        rows = [{"prompt": ask, "chosen": "yes", "rejected": "no", "strength": strength} for ask in ASK]
        data = write(tmp_path / f"{strength}.jsonl", rows)
        done = play("reward", tmp_path / f"run{strength}", model=world.model, data=data, steps=60, batch_size=6,
                    centering=0)  # fmt: skip
        good, bad = by_transformers(done.model, ["a ? yes <eos>", "a ? no <eos>"])
        return float(good - bad)

    assert gap(0.75) == pytest.approx(math.log(3), abs=0.1)  # σ(gap) = 0.75
    assert gap(1.0) > 2 * math.log(3)


def test_labels_make_the_score_a_log_odds(world: World, tmp_path: Path) -> None:
    """ "yes" is good three times of four, "no" never."""
    rows = [{"prompt": ask, "completion": "yes", "label": n > 0} for ask in ASK for n in range(4)]
    rows += [{"prompt": ask, "completion": "no", "label": False} for ask in ASK]
    done = play("reward", tmp_path / "run", model=world.model, data=write(tmp_path / "l.jsonl", rows), kind="labels",
                steps=80, batch_size=30)  # fmt: skip
    good, bad = by_transformers(done.model, ["a ? yes <eos>", "a ? no <eos>"])
    assert float(good) == pytest.approx(math.log(3), abs=0.15)
    assert bad < -2
    assert done.result["accuracy"] is None


def test_attributes_are_ratings_and_their_weighted_sum_the_reward(world: World, tmp_path: Path) -> None:
    rows = [{"prompt": ask, "completion": f"{a} {b}", "first": 4 if a == "yes" else 1, "second": 3 if b == "so" else 0}
            for ask in ASK for a in ("yes", "no") for b in ("so", "it")]  # fmt: skip
    done = play("reward", tmp_path / "run", model=world.model, data=write(tmp_path / "a.jsonl", rows),
                kind="attributes", attributes={"first": 1.0, "second": -0.5}, steps=150, batch_size=12,
                eval_fraction=0.3)  # fmt: skip
    assert facts(done)["attributes"] == {"first": 1.0, "second": -0.5}
    assert done.result["accuracy"] > 0.9
    texts = ["a ? yes so <eos>", "a ? no it <eos>"]
    ratings = by_transformers(done.model, texts)
    assert ratings.tolist() == [pytest.approx([4, 3], abs=0.5), pytest.approx([1, 0], abs=0.5)]
    config = AutoModelForSequenceClassification.from_pretrained(done.model).config
    assert (config.id2label, config.problem_type) == ({0: "first", 1: "second"}, "regression")
    scored = play("sample", tmp_path / "sample", model=world.model, data=world.prompts, reward=done.model, max_tokens=3)
    [row, *_] = [json.loads(line) for line in Path(scored.result["samples"]).read_text().splitlines()]
    whole = by_transformers(done.model, [f"{row['prompt']} {row['completion']} <eos>"])[0]
    if len(row["completion"].split()) < 3:  # finished: its tokens end with <eos>
        raw = whole @ torch.tensor([1.0, -0.5])
        assert row["score"] == pytest.approx(float((raw - done.result["mean"]) / done.result["std"]), abs=1e-4)


# Steps ------------------------------------------------------------------------------------------------------------


def step_rows() -> list[dict[str, Any]]:
    """ "yes" is a right step, "no" a wrong one, whatever stands before it."""
    return [
        {"prompt": ask, "completions": list(line), "labels": [step == "yes" for step in line]}
        for ask in ASK for line in LINES
    ]  # fmt: skip


LINES = (("yes", "yes"), ("yes", "no"), ("no", "yes"), ("no",), ("yes", "yes", "no"), ("yes", "no", "yes"))


@pytest.fixture(scope="module")
def step_model(world: World, tmp_path_factory: pytest.TempPathFactory) -> Played:
    folder = tmp_path_factory.mktemp("steps")
    return play("reward", folder / "run", model=world.model, data=write(folder / "s.jsonl", step_rows()),
                kind="process", separator=" . ", combine="product", steps=120, batch_size=15,
                eval_fraction=0.3)  # fmt: skip


def step_reward(done: Played, dense: bool = False) -> ModelReward:
    from klimb.models.backbone import Backbone
    from klimb.models.faces import RewardModel

    noted = facts(done)
    backbone = Backbone(load_classifier(done.model, torch.device("cpu"), torch.float32))
    return ModelReward(RewardModel(backbone, combine=noted["combine"]), Renderer(load_tokenizer(done.model)),
                       done.model, same_tokenizer=True, dense=dense)  # fmt: skip


def ids(done: Played, text: str) -> list[int]:
    return [int(i) for i in AutoTokenizer.from_pretrained(done.model).convert_tokens_to_ids(text.split())]


def test_steps_are_classified_where_they_end(step_model: Played) -> None:
    assert step_model.rows[0]["loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert step_model.result["accuracy"] > 0.95
    assert facts(step_model) == {"mean": step_model.result["mean"], "std": step_model.result["std"],
                                 "kind": "process", "separator": " . ", "combine": "product"}  # fmt: skip
    run = ids(step_model, "yes . no . yes <eos>")
    classifier = AutoModelForSequenceClassification.from_pretrained(step_model.model)
    whole = torch.tensor([ids(step_model, "<bos> a ?") + run])
    with torch.no_grad():
        states = classifier.base_model(whole).last_hidden_state[0]
        logits = classifier.score(states).squeeze(1)[[4, 6, 8]]  # the two separators and the end
    assert (logits > 0).tolist() == [True, False, True]
    expected = (float(logits.sigmoid().prod()) - step_model.result["mean"]) / step_model.result["std"]
    [score] = step_reward(step_model)(["a ?"], [""], {"completion_ids": [run]}).values
    assert score == pytest.approx(expected, abs=1e-5)


def test_dense_steps_are_paid_where_they_end_and_add_up(step_model: Played) -> None:
    runs = [ids(step_model, text) for text in ("yes . no . yes <eos>", "yes <eos>", "yes . yes", "<eos>")]
    columns = {"completion_ids": runs}
    plain = step_reward(step_model)(["a ?"] * 4, [""] * 4, columns)
    dense = step_reward(step_model, dense=True)(["a ?"] * 4, [""] * 4, columns)
    assert dense.values == pytest.approx(plain.values, abs=1e-6)
    assert plain.steps is None
    assert dense.steps is not None
    assert [[place for place, _ in line] for line in dense.steps] == [[1, 3], [], [1], []]
    first, second = (value for _, value in dense.steps[0])
    assert first > 0 > second  # the right step earns, the wrong one costs
    left = dense.values[0] - first - second
    assert abs(left) < 0.1  # after a wrong step there is hardly anything left to lose


@pytest.mark.parametrize("algorithm", ["ppo", "reinforce++"])
def test_a_policy_learns_right_steps_from_dense_rewards(
    world: World, step_model: Played, tmp_path: Path, algorithm: str
) -> None:
    rl = {**SMALL_RL, "max_tokens": 6}
    given = {"model": world.model, "data": world.prompts, "algorithm": algorithm, "steps": 12, **rl}
    dense = play("rl", tmp_path / "dense", reward={"reward": step_model.model, "dense": True}, **given)
    outcome = play("rl", tmp_path / "outcome", reward=step_model.model, **given)
    assert dense.rows[-1]["reward/mean"] > dense.rows[0]["reward/mean"] + 0.4
    assert dense.rows[0]["reward/mean"] == pytest.approx(outcome.rows[0]["reward/mean"], abs=1e-6)  # the same samples
    first = [parquet.read_table(min((run.path / "samples").glob("*.parquet"))).column("score").to_pylist()
             for run in (dense, outcome)]  # fmt: skip
    assert first[0] == pytest.approx(first[1], abs=1e-5)
    assert dense.rows[-1]["reward/mean"] != outcome.rows[-1]["reward/mean"]  # and yet other credit


def test_dense_rewards_in_a_sum_are_weighed(world: World, step_model: Played, tmp_path: Path) -> None:
    parts = [{"reward": step_model.model, "dense": True, "weight": 2.0, "name": "steps"},
             {"reward": "length", "weight": -0.1}]  # fmt: skip
    given = {"model": world.model, "data": world.prompts, "algorithm": "ppo", "steps": 2, **SMALL_RL}
    done = play("rl", tmp_path / "run", reward=parts, **given)
    assert {"reward/steps", "reward/length"} <= done.rows[0].keys()


def test_what_adds_steps_up_refuses_them(world: World, step_model: Played, here: Path) -> None:
    reward = f"reward={{reward: {step_model.model}, dense: true}}"
    said = klimb("grpo", f"model={world.model}", f"data={world.prompts}", reward, "steps=1", "max_tokens=4")
    assert said.code == 1
    assert "grpo adds them up to the score again" in said.err


def test_a_scalar_model_has_no_steps(world: World, tmp_path: Path) -> None:
    done = play("reward", tmp_path / "rm", model=world.model, data=world.preferences, steps=2, batch_size=9)
    with pytest.raises(Exception, match="it scores whole completions, not their steps"):
        play("rl", tmp_path / "rl", model=world.model, data=world.prompts, reward={"reward": done.model, "dense": True},
             algorithm="ppo", steps=1, **SMALL_RL)  # fmt: skip


def test_reference_samples_are_read_step_by_step(world: World, tmp_path: Path) -> None:
    given = {"model": world.model, "data": write(tmp_path / "s.jsonl", step_rows()), "kind": "process",
             "separator": " . ", "steps": 5, "batch_size": 15}  # fmt: skip
    rows = [{"prompt": row["prompt"], "completion": " . ".join(row["completions"])} for row in step_rows()]
    own = play("reward", tmp_path / "own", **given)
    same = play("reward", tmp_path / "same", reference=write(tmp_path / "ref.jsonl", rows), **given)
    assert (same.result["mean"], same.result["std"]) == pytest.approx((own.result["mean"], own.result["std"]))


def test_a_step_is_paid_at_the_policys_token_before_its_end() -> None:
    """A tool answers in the middle: tokens 2 and 3 are not the policy's."""
    segments = [Segment([5, 6]), Segment([7, 8], policy=False), Segment([9])]
    sample = Sample("0", 0, segments, "stop", step_rewards=[(0, 1.0), (1, 2.0), (3, 4.0), (4, 8.0)])
    assert by_token(sample) == [1.0, 6.0, 8.0]
    behind = Sample("0", 0, [Segment([7], policy=False), Segment([9])], "stop", step_rewards=[(0, 1.0)])
    assert by_token(behind) == [1.0]


def test_the_last_token_of_each_step_is_marked() -> None:
    batch = process.batch_of([Judged("0", [1], [5, 6, 7, 8, 9], [2, 2, 1], [1.0, 0.0, 1.0])])
    assert batch.rows[0][0].mask == [False, True, False, True, True]
    assert batch["labels"].tolist() == [[1.0, 0.0, 1.0]]


# Verdicts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("conversational", [False, True])
def test_a_verifier_answers_in_words_and_its_odds_are_the_reward(tmp_path: Path, conversational: bool) -> None:
    def text(role: str, content: str) -> Any:
        return [{"role": role, "content": content}] if conversational else content

    rows = [{"prompt": text("user", f"{a}?"), "completion": text("assistant", reply), "label": reply == "good"}
            for a in "abcdefgh" for reply in ("good", "bad")]  # fmt: skip
    data, model = write(tmp_path / "v.jsonl", rows), chat_model(tmp_path / "model", "llama", 128)
    done = play("reward", tmp_path / "run", model=model, data=data, kind="generative", instruction="\nok?\n",
                steps=60, batch_size=12, eval_fraction=0.3, optimizer={"lr": 3e-3})  # fmt: skip
    assert done.result["accuracy"] > 0.95
    noted = facts(done)
    assert (noted["kind"], noted["instruction"]) == ("generative", "\nok?\n")
    tokenizer = AutoTokenizer.from_pretrained(done.model)
    answers = AutoModelForCausalLM.from_pretrained(done.model)
    scored = play("sample", tmp_path / "s", model=model, reward=done.model, max_tokens=3, temperature=1.0,
                  data=write(tmp_path / "p.jsonl", [{"prompt": text("user", "a?")}]))  # fmt: skip
    [row] = [json.loads(line) for line in Path(scored.result["samples"]).read_text().splitlines()]
    if conversational:
        asked = tokenizer.apply_chat_template(
            [*row["prompt"], *row["completion"], {"role": "user", "content": "\nok?\n"}], add_generation_prompt=True,
            tokenize=False,
        )  # fmt: skip
    else:
        asked = "<bos>" + row["prompt"] + row["completion"] + "\nok?\n"
    with torch.no_grad():
        inputs = tokenizer(asked, return_tensors="pt", add_special_tokens=False)
        logps = answers(**inputs).logits[0, -1].log_softmax(-1)
    yes, no = tokenizer.convert_tokens_to_ids(["Y", "N"])
    raw = float(logps[yes] - logps[no])
    assert row["score"] == pytest.approx((raw - noted["mean"]) / noted["std"], abs=1e-3)


@pytest.mark.parametrize("kind", ["rankings", "labels", "process", "attributes", "generative"])
def test_scores_have_mean_0_and_std_1_on_the_references(world: World, tmp_path: Path, kind: str) -> None:
    """Written figures are those of the raw scores."""
    model: str = world.model
    rows: list[dict[str, Any]] = [
        {"prompt": ask, "completion": word, "label": word == "yes", "first": len(word)} for ask in ASK
        for word in ("yes", "no")
    ]  # fmt: skip
    given: dict[str, Any] = {"attributes": {"attributes": {"first": 2.0}}, "process": {"separator": " . "}}.get(
        kind, {}
    )
    if kind == "process":
        rows = step_rows()
    elif kind == "rankings":
        rows = [{"prompt": ask, "completions": ["yes", "no"], "scores": [1, 0]} for ask in ASK]
    elif kind == "generative":
        model = chat_model(tmp_path / "model", "llama", 128)
    done = play("reward", tmp_path / "run", model=model, data=write(tmp_path / "d.jsonl", rows), kind=kind, steps=4,
                batch_size=6, **given)  # fmt: skip
    assert done.result["std"] > 0
    assert math.isfinite(done.result["mean"])
    assert facts(done).get("kind", "scalar") == {"rankings": "scalar", "labels": "scalar"}.get(kind, kind)


# Encoders ---------------------------------------------------------------------------------------------------------


def bert(folder: Path, config: Any = None) -> str:
    """A BERT of random numbers that knows the words of the world."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["[UNK]", *WORDS])}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.add_special_tokens(["[PAD]", "[CLS]", "[SEP]"])
    ends = [(name, words.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    words.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]",
                                        cls_token="[CLS]", sep_token="[SEP]")  # fmt: skip
    config = config or BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=32, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModel.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("kind", ["bradley_terry", "attributes", "ordinal"])
def test_an_encoder_is_trained_and_scores_as_transformers_does(world: World, tmp_path: Path, kind: str) -> None:
    rows = [
        {"prompt": ask, "completion": word, "first": worth} for ask in ASK for word, worth in (("yes", 1), ("no", -1))
    ]
    data = world.preferences if kind == "bradley_terry" else write(tmp_path / "a.jsonl", rows)
    given = {"attributes": {"attributes": {"first": 2.0}}, "ordinal": {"rating": "first"}}.get(kind, {})
    done = play("reward", tmp_path / "run", model=bert(tmp_path / "bert"), data=data, kind=kind, steps=80, batch_size=9,
                eval_fraction=0.4, optimizer={"lr": 5e-4}, **given)  # fmt: skip
    assert done.result["accuracy"] > 0.95
    assert done.result["std"] > 0.3
    scored = play("sample", tmp_path / "s", model=world.model, data=world.prompts, reward=done.model, max_tokens=3)
    found = [json.loads(line) for line in Path(scored.result["samples"]).read_text().splitlines()]
    raw = by_transformers(done.model, [f"{row['prompt']} {row['completion']}" for row in found])[:, 0]
    raw = raw * 2.0 if kind == "attributes" else raw
    expected = (raw - done.result["mean"]) / done.result["std"]
    assert [row["score"] for row in found] == pytest.approx(expected.tolist(), abs=1e-4)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [({"lora": {"rank": 2}}, "an encoder is trained whole"), ({"kind": "process", "separator": " . "}, "from behind")],
)
def test_what_an_encoder_cannot_do(world: World, tmp_path: Path, settings: dict[str, Any], complaint: str) -> None:
    data = write(tmp_path / "s.jsonl", step_rows()) if "kind" in settings else world.preferences
    with pytest.raises(ConfigError, match=complaint):
        play("reward", tmp_path / "run", model=bert(tmp_path / "bert"), data=data, steps=1, **settings)


SEQ2SEQ = {
    "t5": lambda end: T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=2, eos_token_id=end,
        pad_token_id=0, decoder_start_token_id=0,
    ),
    "bart": lambda end: BartConfig(
        vocab_size=64, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=32, eos_token_id=end,
        pad_token_id=0, decoder_start_token_id=end,
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", SEQ2SEQ)
def test_an_encoder_with_a_decoder_is_trained_and_scores_as_transformers_does(
    world: World, tmp_path: Path, family: str
) -> None:
    end = len(WORDS) + 3  # [SEP]
    model = bert(tmp_path / family, SEQ2SEQ[family](end))
    assert AutoTokenizer.from_pretrained(model).sep_token_id == end
    done = play("reward", tmp_path / "run", model=model, data=world.preferences, steps=80, batch_size=9,
                eval_fraction=0.4, optimizer={"lr": 1e-3})  # fmt: skip
    assert done.result["accuracy"] > 0.95
    scored = play("sample", tmp_path / "s", model=world.model, data=world.prompts, reward=done.model, max_tokens=3)
    found = [json.loads(line) for line in Path(scored.result["samples"]).read_text().splitlines()]
    raw = by_transformers(done.model, [f"{row['prompt']} {row['completion']}" for row in found])[:, 0]
    expected = (raw - done.result["mean"]) / done.result["std"]
    assert [row["score"] for row in found] == pytest.approx(expected.tolist(), abs=1e-4)


def test_end_tokens_within_a_text(world: World, tmp_path: Path) -> None:
    """Texts with one and with two of them, and one without, in a batch and alone."""
    end = len(WORDS) + 3
    network = load_encoder(bert(tmp_path / "t5", SEQ2SEQ["t5"](end)), torch.device("cpu"), torch.float32, 0, 1)
    model = EncoderReward(Backbone(network))
    rows = [[Row(list(prompt), [3, end], [True] * 2)] for prompt in ([1, 2], [1, end, 2], [2, end, end])]
    rows.append([Row([4, 5], [6], [True])])
    together = model(TokenBatch.from_rows(rows, [0, 1, 2, 3], ["row"] * 4))
    alone = torch.cat([model(TokenBatch.from_rows([row], [0], ["row"])) for row in rows])
    assert torch.allclose(together, alone, atol=1e-6)
    assert len(set(together.tolist())) == 4
    ended = [Row([4, 5], [6, end], [True] * 2)]
    assert torch.allclose(model(TokenBatch.from_rows([ended], [0], ["row"])), alone[3:], atol=1e-6)


def test_an_encoder_that_gives_no_score_is_refused(world: World, tmp_path: Path) -> None:
    small = BertConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    (tmp_path / "pair").mkdir()
    EncoderDecoderConfig.from_encoder_decoder_configs(small, small).save_pretrained(tmp_path / "pair")
    with pytest.raises(KlimbError, match="no sequence classifier for encoder-decoder"):
        is_encoder(str(tmp_path / "pair"))


@pytest.mark.parametrize("count", [1, 7, 600])
def test_order_is_counted_as_in_all_pairs(count: int) -> None:
    """With ties of both kinds, in one part and in several; the interval is that of the values themselves."""
    random = torch.Generator().manual_seed(count)
    scores = torch.randint(0, 9, (count,), generator=random).float()
    worth = torch.randint(0, 5, (count,), generator=random).double()
    pairs = [
        [
            0.5 if scores[a] == scores[b] else float((scores[a] > scores[b]) == (worth[a] > worth[b]))
            for b in range(count) if worth[a] != worth[b]
        ]
        for a in range(count)
    ]  # fmt: skip
    found = in_order(scores, worth)
    assert [(each.size, each.total) for each in found] == [(len(values), sum(values)) for values in pairs]
    assert [*tally_interval(found)] == pytest.approx([*mean_interval(pairs)], rel=1e-12, nan_ok=True)
