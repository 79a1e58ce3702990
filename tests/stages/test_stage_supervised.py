"""Stages that learn from written answers: demonstrations and comparisons."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from world import World, lines, play, write

import klimb
from klimb import native
from klimb.errors import DataError, Interrupted, KlimbError, RewardError
from klimb.rollout.engine import finished_groups
from klimb.stages.evaluate import best_of_curve, best_of_row
from klimb.stages.sample import Keep, comparisons, demonstrations
from klimb.types import Group, Prompt, Sample


def test_sft_learns_eight_rows_by_heart(world: World, tmp_path: Path) -> None:
    done = play("sft", tmp_path / "run", model=world.model, data=world.demonstrations, steps=80, batch_size=8)
    assert done.rows[0]["loss"] > 2  # about ln 16: nothing is known
    assert done.rows[-1]["loss"] < 0.05
    tokenizer = AutoTokenizer.from_pretrained(done.model)
    model = AutoModelForCausalLM.from_pretrained(done.model)
    for row in lines(Path(world.demonstrations)):
        ids = tokenizer(row["prompt"], return_tensors="pt").input_ids
        answer = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8)[0]
        assert tokenizer.decode(answer[ids.shape[1] :], skip_special_tokens=True) == row["completion"]


def test_sft_holds_out_prompts_and_measures_them(world: World, tmp_path: Path) -> None:
    options = {"model": world.model, "data": world.demonstrations, "steps": 3, "batch_size": 4, "eval_every": 2}
    done = play("sft", tmp_path / "run", **options, eval_data=world.demonstrations)
    assert ["eval/loss" in row for row in done.rows] == [False, True, True]
    assert done.rows[1]["eval/loss"] < done.rows[0]["loss"]
    split = play("sft", tmp_path / "split", **options, eval_fraction=0.5)
    assert split.rows[2]["eval/loss"] != done.rows[2]["eval/loss"]


def test_sft_stops_when_the_answers_are_good_enough(world: World, tmp_path: Path) -> None:
    data = write(tmp_path / "echo.jsonl", [{"prompt": f"{a} ?", "completion": a, "answer": a} for a in "abcdef"])
    until = {"data": data, "at_least": 0.9, "every": 10, "max_tokens": 3}
    done = play("sft", tmp_path / "run", model=world.model, data=data, steps=500, batch_size=6, until=until)
    scores = [row["eval/score"] for row in done.rows if "eval/score" in row]
    assert scores[-1] >= 0.9 > max(scores[:-1], default=0.0)
    assert done.result["steps"] == len(done.rows) == 10 * len(scores) < 500


def test_early_stopping_refuses_prompts_that_leave_no_room_for_answers(world: World, tmp_path: Path) -> None:
    rows = [{"prompt": f"{a} ?", "answer": a} for a in "ab"]
    until = {"data": write(tmp_path / "until.jsonl", rows), "at_least": 2.0, "every": 2, "max_tokens": 3}
    options: dict[str, Any] = {"model": world.model, "data": world.demonstrations, "steps": 2, "batch_size": 8}
    assert "eval/score" in play("sft", tmp_path / "run", **options, until=until).rows[1]
    write(tmp_path / "until.jsonl", [{"prompt": "a " * 22 + "?", "answer": "a"}])
    with pytest.raises(DataError, match=r"until\.jsonl"):
        play("sft", tmp_path / "long", **options, until=until)
    assert not (tmp_path / "long" / "metrics.jsonl").exists()


def _interrupted_after_a_group(monkeypatch: pytest.MonkeyPatch) -> list[Group]:
    """Ctrl-C when the first group is finished; what was finished after it, too."""
    finished: list[Group] = []

    def told(stream: Any) -> Iterator[tuple[Any, Group]]:
        for request, group in finished_groups(stream):
            if not finished:
                os.kill(os.getpid(), signal.SIGINT)
            finished.append(group)
            yield request, group

    monkeypatch.setattr("klimb.rollout.engine.finished_groups", told)
    return finished


@pytest.mark.parametrize("stage", ["sample", "evaluate", "revise", "sft"])
def test_ctrl_c_ends_sampling_outside_the_steps(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    measure = {"data": world.prompts, "reward": world.reward("count"), "samples_per_prompt": 2, "max_tokens": 4}
    settings: dict[str, Any] = {
        "sample": {"data": world.prompts, "max_tokens": 4}, "revise": {"data": world.prompts, "max_tokens": 4},
        "evaluate": {"measure": measure},
        "sft": {"data": world.demonstrations, "steps": 2, "checkpoint_every": 0, "measure": measure},
    }[stage]  # fmt: skip
    with monkeypatch.context() as patched:
        finished = _interrupted_after_a_group(patched)
        with pytest.raises(Interrupted, match="draws them anew"):
            play(stage, tmp_path / "run", model=world.model, **settings)
    assert len(finished) == 1
    if stage == "sft":  # the training is kept, though no checkpoint was due
        done = play(stage, tmp_path / "run", model=world.model, **settings)
        assert "continuing after step 2" in done.said
        assert done.result["evaluation"]["n"] == 12


@pytest.mark.parametrize(
    ("loss", "start"), [("dpo", math.log(2)), ({"ipo": {"beta": 0.2}}, 1 / (4 * 0.2**2)), ("cdpo", math.log(2))]
)
def test_preferences_start_where_policy_is_reference_and_are_learnt(
    world: World, tmp_path: Path, loss: object, start: float
) -> None:
    done = play(
        "preference", tmp_path / "run", model=world.model, data=world.preferences, loss=loss, steps=30, batch_size=18
    )
    assert done.rows[0]["loss"] == pytest.approx(start, rel=1e-6)
    assert done.rows[0]["margin"] == 0.0
    assert done.rows[-1]["accuracy"] > 0.95
    assert done.rows[-1]["loss"] < start / 2
    assert done.rows[-1]["chosen_log_ratio"] > done.rows[-1]["rejected_log_ratio"]


def test_preferences_are_measured_on_held_out_pairs(world: World, tmp_path: Path) -> None:
    done = play(
        "preference",
        tmp_path / "run",
        model=world.model,
        data=world.preferences,
        steps=20,
        batch_size=9,
        eval_fraction=0.4,
        eval_every=10,
    )
    measured = [row for row in done.rows if "eval/accuracy" in row]
    assert [row["step"] for row in measured] == [10, 20]
    assert measured[-1]["eval/accuracy"] > 0.95  # "yes" and "no" decide, whatever was asked
    assert measured[-1]["eval/loss"] < math.log(2)


def test_a_reward_model_is_trained_until_it_is_right_often_enough(world: World, tmp_path: Path) -> None:
    given = {"model": world.model, "data": world.preferences, "steps": 12, "batch_size": 9,
             "eval_every": 4, "checkpoint_every": 1, "until_accuracy": 0.95}  # fmt: skip
    turned = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in lines(Path(world.preferences))]
    never = play("reward", tmp_path / "never", eval_data=write(tmp_path / "turned.jsonl", turned), **given)
    assert len(never.rows) == 12
    run = tmp_path / "run"
    done = play("reward", run, eval_data=world.preferences, **given)
    assert len(done.rows) == 4  # "yes" and "no" decide: one look is enough
    assert done.rows[-1]["eval/accuracy"] >= 0.95
    assert "stopped at step 4: the wanted accuracy is reached" in done.said
    weights = (Path(done.model) / "model.safetensors").read_bytes()
    (run / "result.json").unlink()  # as if it had been killed after its last checkpoint
    assert len(play("reward", run, eval_data=world.preferences, **given).rows) == 4
    assert (Path(done.model) / "model.safetensors").read_bytes() == weights


def test_reward_model_separates_pairs_and_transformers_gives_its_scores(world: World, tmp_path: Path) -> None:
    done = play(
        "reward", tmp_path / "run", model=world.model, data=world.preferences, steps=30, batch_size=9, eval_fraction=0.4
    )
    assert done.rows[0]["loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert done.rows[-1]["accuracy"] > 0.95
    assert done.result["accuracy"] > 0.95
    assert done.result["held_out_pairs"] > 0
    normalisation = json.loads((Path(done.model) / "reward.json").read_text())
    assert normalisation == {"mean": done.result["mean"], "std": done.result["std"]}
    tokenizer = AutoTokenizer.from_pretrained(done.model)
    classifier = AutoModelForSequenceClassification.from_pretrained(done.model)
    texts = tokenizer(["a ? yes it <eos>", "a ? no it <eos>"], return_tensors="pt", padding=True)
    good, bad = classifier(texts.input_ids, attention_mask=texts.attention_mask).logits.squeeze(1).tolist()
    assert good > bad + 1


def test_a_reward_model_that_learnt_nothing_is_refused(world: World, tmp_path: Path) -> None:
    swapped = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in lines(Path(world.preferences))]
    with pytest.raises(RewardError, match=r"held-out accuracy is 0.000, below min_accuracy=0.6"):
        play(
            "reward",
            tmp_path / "run",
            model=world.model,
            data=world.preferences,
            steps=5,
            batch_size=9,
            min_accuracy=0.6,
            eval_data=write(tmp_path / "swapped.jsonl", swapped),
        )
    assert not (tmp_path / "run" / "model").exists()


def test_sample_writes_scored_replies_and_comparisons(world: World, tmp_path: Path) -> None:
    done = play(
        "sample",
        tmp_path / "run",
        model=world.model,
        data=world.prompts,
        samples_per_prompt=8,
        max_tokens=4,
        reward=world.reward("count"),
        pairs=True,
    )
    samples = lines(Path(done.result["samples"]))
    assert len(samples) == 6 * 8
    assert all(
        row["score"] == row["completion"].split().count("yes") / max(len(row["completion"].split()), 1)
        for row in samples
    )
    pairs = lines(Path(done.result["preferences"]))
    assert 0 < len(pairs) == done.result["pairs"]
    assert done.result["pairs"] + done.result["left_out"] == 6 * 8 // 2
    scores = {(row["prompt"], row["completion"]): row["score"] for row in samples}
    assert all(scores[p["prompt"], p["chosen"]] > scores[p["prompt"], p["rejected"]] for p in pairs)


@pytest.mark.parametrize("conversational", [False, True])
def test_a_reply_that_says_nothing_is_no_demonstration_and_in_no_comparison(conversational: bool) -> None:
    def sample(index: int, text: str, score: float) -> Sample:
        reply: Any = [{"role": "assistant", "content": text}] if conversational else text
        return Sample("p", index, [], "stop", reply, score=score)

    texts = ["", "yes", "no", "yes"]
    group = Group(Prompt("p", [], "?"), [sample(i, text, float(-i)) for i, text in enumerate(texts)])
    [kept] = demonstrations([group], Keep())
    assert kept["completion"] == group.samples[1].text
    [pair] = comparisons([group], 0.0, random.Random(0))
    assert pair["chosen"] == group.samples[2].text


def test_sample_labels_steps_by_what_stands_up_to_their_end(world: World, tmp_path: Path) -> None:
    """ "so" stands between steps; `settled` tells a beginning, behind which a separator stands, from a whole."""
    done = play("sample", tmp_path / "run", model=world.model, data=world.prompts, samples_per_prompt=20, max_tokens=6,
                reward=world.reward("settled"), separator=" so ")  # fmt: skip
    rows = lines(Path(done.result["steps"]))
    texts = [row["completion"] for row in lines(Path(done.result["samples"]))]
    split = [[part.strip() for part in text.split("so") if part.strip()] for text in texts]
    assert [row["completions"] for row in rows] == [steps for steps in split if steps]
    for row in rows:
        *begun, last = row["completions"]
        assert row["labels"] == [*("no" not in " ".join(begun[: n + 1]).split() for n in range(len(begun))),
                                 last.endswith("yes")]  # fmt: skip
    labels = [label for row in rows for label in row["labels"]]
    assert done.result["steps_right"] == sum(labels) / len(labels)
    assert {len(row["labels"]) for row in rows} >= {1, 2}
    assert {*labels} == {True, False}
    learnt = play("reward", tmp_path / "rm", model=world.model, data=done.result["steps"], kind="process",
                  separator=" so ", steps=2, batch_size=8)  # fmt: skip
    assert learnt.result["std"] > 0


def test_evaluate_gives_intervals_kl_and_best_of_n(world: World, tmp_path: Path) -> None:
    measure = {
        "data": world.prompts,
        "reward": world.reward("count"),
        "gold": world.reward("count"),
        "samples_per_prompt": 32,
        "max_tokens": 4,
    }
    tuned = play("sft", tmp_path / "sft", model=world.model, data=world.demonstrations, steps=2, batch_size=8)
    done = play(
        "evaluate",
        tmp_path / "run",
        model=tuned.model,
        reference=world.model,
        measure=measure,
        best_of=[1, 4, 16],
        report_n=4,
    )
    evaluation, curve = done.result["evaluation"], done.result["curve"]
    assert evaluation["n"] == 6 * 32
    assert evaluation["gold_low"] < evaluation["gold"] < evaluation["gold_high"]
    assert [row["n"] for row in curve] == [1, 4, 16]
    assert curve[0]["gold"] < curve[1]["gold"] < curve[2]["gold"]  # the proxy is the gold here
    assert curve[1]["kl"] == pytest.approx(math.log(4) - 3 / 4)
    plain = play("evaluate", tmp_path / "plain", model=tuned.model, reference=world.model, measure=measure)
    assert plain.result["evaluation"]["kl"] > 0
    own = play("evaluate", tmp_path / "own", model=world.model, measure=measure)
    assert own.result["evaluation"]["kl"] == 0


def test_best_of_n_leaves_out_prompts_with_too_few_scores(world: World, tmp_path: Path) -> None:
    """`some` abstains on replies that begin with "no", and on all replies to "b ?" but one."""
    measure = {"data": world.prompts, "reward": world.reward("some"), "samples_per_prompt": 16, "max_tokens": 4}
    done = play("evaluate", tmp_path / "run", model=world.model, measure=measure, best_of=[2, 16], report_n=2)
    found = {event["n"]: event["left_out"] for event in done.events if event["kind"] == "best_of"}
    assert 1 <= found[2] < 6
    assert found[2] <= found[16]
    assert any(line.startswith("best of 2: ") for line in done.said)
    [two, sixteen] = done.result["curve"]
    assert 0 <= two["proxy"] <= 1
    assert ("proxy" in sixteen) == (found[16] < 6)
    assert done.result["evaluation"]["proxy_low"] <= done.result["evaluation"]["proxy_high"]


def test_a_prompt_without_a_score_changes_nothing_of_the_others_best() -> None:
    def group(name: str, *scores: float | None) -> Group:
        return Group(Prompt(name, [], "?"), [Sample(name, i, [], "stop", score=s) for i, s in enumerate(scores)])

    whole = [group("a", 0.0, 1.0, 2.0, 3.0), group("b", 1.0, 1.0, 5.0, 0.0)]
    more = [*whole, group("c", None, 9.0, None, None), group("d")]
    assert best_of_curve(more, [2]) == best_of_curve(whole, [2])
    assert best_of_row(more, 2) == best_of_row(whole, 2)
    # An abstention among enough others: the best of two among the three that are left.
    assert best_of_curve([group("e", 0.0, None, 3.0, 6.0)], [2])[0]["proxy"] == pytest.approx((6 + 6 + 3) / 3)


def test_the_token_budget_is_decided_once_and_stays(world: World, tmp_path: Path) -> None:
    options = {"model": world.model, "data": world.demonstrations, "steps": 2, "batch_size": 8}
    run = tmp_path / "run"
    play("sft", run, **options)
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["decisions"]["token_budget"] == 1024
    manifest["decisions"]["token_budget"] = 3  # as if the machine had chosen otherwise when the run began
    (run / "manifest.json").write_text(json.dumps(manifest))
    (run / "result.json").unlink()
    shutil.rmtree(run / "checkpoints")
    assert [line for line in play("sft", run, **options).said if line.startswith("token_budget=3: ")]


@pytest.mark.skipif(native.why_not() is not None, reason=f"no kernels: {native.why_not()}")
def test_the_kernels_are_decided_once_and_stay(world: World, tmp_path: Path) -> None:
    options = {"model": world.model, "data": world.demonstrations, "steps": 2, "batch_size": 8}

    def begun(name: str, **settings: Any) -> tuple[Path, str]:
        play("sft", tmp_path / name, **options, **settings)
        return tmp_path / name, json.loads((tmp_path / name / "manifest.json").read_text())["decisions"]["kernels"]

    def again(run: Path, decided: str) -> str:
        manifest = json.loads((run / "manifest.json").read_text())
        manifest["decisions"]["kernels"] = decided
        (run / "manifest.json").write_text(json.dumps(manifest))
        (run / "result.json").unlink()
        shutil.rmtree(run / "checkpoints")
        play("sft", run, **options)
        return (run / "events.jsonl").read_text()

    run, decided = begun("auto")
    assert decided == f"native {native.made_of()}"
    torch_run, torch_decided = begun("torch", kernels="torch")
    assert torch_decided == "torch"
    weights = (run / "model/model.safetensors").read_bytes()
    assert weights != (torch_run / "model/model.safetensors").read_bytes()  # rounding tells the two apart
    again(run, "torch")
    assert (run / "model/model.safetensors").read_bytes() == (torch_run / "model/model.safetensors").read_bytes()
    assert "the kernels that it began with are not here" in again(run, "native 0123")
    assert (run / "model/model.safetensors").read_bytes() == weights


def test_kernels_that_cannot_be_had_are_named(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "why_not", lambda: "no C compiler was found; install gcc")
    options = {"model": world.model, "data": world.demonstrations, "steps": 1, "batch_size": 8}
    told = "kernels: torch's operators, slower than klimb's own (no C compiler was found; install gcc)"
    assert told in play("sft", tmp_path / "auto", **options).said
    assert not [line for line in play("sft", tmp_path / "torch", kernels="torch", **options).said if "kernels:" in line]
    with pytest.raises(KlimbError, match="kernels=native cannot be had: no C compiler was found; install gcc; set"):
        play("sft", tmp_path / "native", kernels="native", **options)


def test_prepared_data_that_is_found_again_trains_to_the_same_bits(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    given = {"model": world.model, "data": world.demonstrations, "steps": 4, "batch_size": 5, "eval_fraction": 0.3}
    runs = [play("sft", tmp_path / name, **given) for name in ("miss", "hit")]
    manifests = [json.loads((run.path / "manifest.json").read_text())["data"]["data"] for run in runs]
    assert [facts.pop("cache").split(":")[0] for facts in manifests] == ["miss, kept", "hit"]
    assert manifests[0] == manifests[1]
    assert (manifests[0]["rows"], manifests[0]["used"], manifests[0]["dropped"]) == (8, 8, {})
    assert [sum("  cache " in line for line in run.said) for run in runs] == [1, 1]
    weights = [(Path(run.model) / "model.safetensors").read_bytes() for run in runs]
    assert weights[0] == weights[1]


ASKED = [{"prompt": f"{a} ?", "completion": f"it is {a} ."} for a in "abcdef"]


@pytest.mark.parametrize("form", ["list", "iterator", "iterable", "dataset"])
def test_rows_from_python_are_known_by_their_content(world: World, here: Path, form: str) -> None:
    class Rows:
        def __init__(self, rows: list[dict[str, str]]) -> None:
            self._rows = rows

        def __iter__(self) -> Iterator[dict[str, str]]:
            return iter(self._rows)

    make = {"list": list, "iterator": iter, "iterable": Rows, "dataset": Dataset.from_list}[form]
    common = {"model": world.model, "steps": 1, "batch_size": 6, "threads": 1, "device": "cpu"}

    def run(rows: list[dict[str, str]]) -> str:
        recipe = {"name": "own", "stages": {"sft": {"stage": "sft", "data": make(rows), **common}}}
        return str(klimb.run(recipe, say=lambda line: None).out)

    first, again, other = run(ASKED), run(ASKED), run(ASKED[:5])
    assert first == again != other
    manifest = json.loads((Path(first) / "sft" / "manifest.json").read_text())
    assert (manifest["data"]["data"]["rows"], manifest["data"]["data"]["cache"]) == (6, "")


def test_several_files_are_inputs_and_an_overlap_is_counted(world: World, tmp_path: Path) -> None:
    a, b = write(tmp_path / "a.jsonl", ASKED[:4]), write(tmp_path / "b.jsonl", [*ASKED[3:], ASKED[5]])
    given = {"model": world.model, "data": {a: 2, b: 1}, "eval_data": [b], "steps": 1, "batch_size": 4}
    run = play("sft", tmp_path / "run", **given)
    manifest = json.loads((run.path / "manifest.json").read_text())
    assert [manifest["inputs"][key]["source"] for key in ("data[0]", "data[1]")] == [a, b]
    data, held_out = manifest["data"]["data"], manifest["data"]["eval_data"]
    assert (data["rows"], data["used"], data["repeats"]) == (8, 12, 2)
    assert (held_out["rows"], held_out["also_trained_on"]) == (4, 4)
    assert "  4 of the 4 prompts of eval_data are in the training data, too" in run.said


def test_what_was_dropped_and_why_is_in_the_manifest(world: World, tmp_path: Path) -> None:
    rows = [
        *ASKED,
        {"prompt": "a ?", "completion": ""},
        {"prompt": "a " * 30, "completion": "b"},
        {"prompt": "b ?", "completion": None},
    ]
    data = write(tmp_path / "rows.jsonl", [*rows, {"prompt": "a " * 31, "completion": "b"}])
    run = play("sft", tmp_path / "run", model=world.model, data=data, on_bad="drop", steps=1, batch_size=4)
    found = json.loads((run.path / "manifest.json").read_text())["data"]["data"]
    assert (found["rows"], found["used"]) == (10, 6)
    assert found["dropped"]["the row has n tokens, where at most n fit"] == 2
    assert found["dropped"]["completion is empty"] == 1
    assert sum(found["dropped"].values()) == 4
