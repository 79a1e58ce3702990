"""Reward models of each kind on real solutions: GSM8K problems with four solutions each, right and wrong.

    python benchmarks/gsm8k_rewards.py model_solutions.jsonl.gz train.jsonl.gz [--seed 0] [--out runs/gsm8k-rewards]

The solutions are those of four GPT-3 models (openai/grade-school-math). A quarter of the problems is held out by hash,
the same for every seed. A small model of random numbers learns the language of the training part (and of 2,000 of
GSM8K's own solutions), then four reward models start from it: scalar (pairs of a right and a wrong one of a problem),
labels (each solution right or wrong), generative (Yes or No in words) and process (each line right or wrong: a line is
wrong where a calculation <<48/2=25>> in it is, the last line where the answer is). Beside them stand judges of length
and of words alone. Printed: how often a right solution scores above a wrong one of its problem, and how often the best
of the four is right, beside a vote of the four answers, a draw and the oracle. Nothing is chosen by the result.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import torch

import klimb
from klimb.data.render import Renderer
from klimb.lab.scratch import make_model, piece_tokenizer
from klimb.models.backbone import Backbone
from klimb.models.faces import Policy, RewardModel, Verdicts
from klimb.models.load import load_causal, load_classifier, reward_facts
from klimb.models.place import load_tokenizer
from klimb.rewards.model import ModelReward
from klimb.stages import baselines
from klimb.watch.statistics import mean_interval

SOURCES = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")
HELD_OUT, VOCABULARY, CONTEXT, LANGUAGE = 0.25, 2_000, 512, 2_000
TOKEN = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+|[-+*/()])")


class Solution(NamedTuple):
    text: str
    right: bool

    @property
    def answer(self) -> str:
        return self.text.rpartition("A: ")[2].strip().replace(",", "").removesuffix(".0")

    def steps(self) -> tuple[list[str], list[bool]]:
        lines = [line for line in self.text.split("\n") if line.strip()]
        marks = [all(map(calculates, re.findall(r"<<(.*?)>>", line))) for line in lines]
        return lines, [*marks[:-1], self.right]


class Problem(NamedTuple):
    question: str
    solutions: list[Solution]

    @property
    def prompt(self) -> str:
        return f"{self.question}\n"

    @property
    def pairs(self) -> list[tuple[Solution, Solution]]:
        return [(a, b) for a in self.solutions for b in self.solutions if a.right > b.right]


def calculates(equation: str) -> bool:
    """Is "48/2=24" so, up to rounding? What cannot be read is no mistake of the solution's."""
    left, found, right = equation.rpartition("=")
    try:
        value, expected = exactly(left), Fraction(right.strip())
    except (ValueError, ZeroDivisionError):
        return True
    return abs(value - expected) <= Fraction(1, 100) * max(1, abs(value)) if found else True


def exactly(text: str) -> Fraction:
    """The value of + − * / and brackets, read token by token. Raises ValueError where it is something else."""
    tokens = TOKEN.findall(text)
    if "".join(tokens) != re.sub(r"\s", "", text):
        raise ValueError(text)

    def atom() -> Fraction:
        token = tokens.pop(0) if tokens else ""
        if token == "-":
            return -atom()
        if token == "(":
            value = total()
            if not tokens or tokens.pop(0) != ")":
                raise ValueError(text)
            return value
        return Fraction(token)

    def product() -> Fraction:
        value = atom()
        while tokens and tokens[0] in "*/":
            value = value * atom() if tokens.pop(0) == "*" else value / atom()
        return value

    def total() -> Fraction:
        value = product()
        while tokens and tokens[0] in "+-":
            value = value + product() if tokens.pop(0) == "+" else value - product()
        return value

    found = total()
    if tokens:
        raise ValueError(text)
    return found


def read(path: Path) -> list[Problem]:
    with gzip.open(path, "rt") as file:
        rows = [json.loads(line) for line in file]
    return [
        Problem(row["question"], [Solution(row[s]["solution"], row[s]["is_correct"]) for s in SOURCES]) for row in rows
    ]


def is_held_out(problem: Problem) -> bool:
    return int.from_bytes(hashlib.sha256(problem.question.encode()).digest()[:8], "big") / 2**64 < HELD_OUT


def written(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def train(problems: Sequence[Problem], language: Path, out: Path, seed: int) -> dict[str, str]:
    """Model directories by kind."""
    out.mkdir(parents=True, exist_ok=True)
    solutions = [(problem, solution) for problem in problems for solution in problem.solutions]
    with gzip.open(language, "rt") as file:
        shown = [json.loads(line) for line in file][:LANGUAGE]
    texts = [f"{row['question']}\n{row['answer'].replace('####', 'A:')}" for row in shown]
    texts += [problem.prompt + solution.text for problem, solution in solutions]
    model = make_model(
        out / "base", tokenizer=piece_tokenizer(texts, VOCABULARY), architecture="llama", hidden=128, layers=3, heads=4,
        mlp=344, context=CONTEXT, seed=seed, tie=True,
    )  # fmt: skip
    rows = {
        "bradley_terry": [
            {"prompt": p.prompt, "chosen": a.text, "rejected": b.text} for p in problems for a, b in p.pairs
        ],
        "labels": [{"prompt": p.prompt, "completion": s.text, "label": s.right} for p, s in solutions],
        "process": [
            {"prompt": p.prompt, "completions": steps, "labels": labels} for p, s in solutions
            for steps, labels in [s.steps()]
        ],
    }  # fmt: skip
    rows["generative"] = rows["labels"]
    common = {"on_bad": "drop", "batch_size": 32, "checkpoint_every": 0}
    stages: dict[str, dict[str, Any]] = {
        "language": {
            "stage": "sft", "model": str(model), "data": written(out / "language.jsonl", [{"text": t} for t in texts]),
            "epochs": 2, "optimizer": {"lr": 3e-3, "warmup_steps": 20, "decay": "linear"}, **common,
        },
        **{
            kind: {
                "stage": "reward", "kind": kind, "model": "${language.model}", "epochs": 2,
                "data": written(out / f"{kind}.jsonl", rows[kind]),
                "optimizer": {"lr": 3e-4, "warmup_steps": 10, "decay": "linear"}, **common,
            } for kind in ("bradley_terry", "labels", "generative", "process")
        },
    }  # fmt: skip
    recipe = {"name": "gsm8k-rewards", "threads": 1, "token_budget": 4096, "seed": seed, "out": str(out / "run")}
    found = klimb.run({**recipe, "stages": stages})
    return {kind: str(found[kind].model) for kind in stages if kind != "language"}


def judge(directory: str) -> Callable[[Problem], list[float]]:
    facts, place, dtype = reward_facts(directory), torch.device("cpu"), torch.float32
    model: RewardModel | Verdicts
    if facts.get("kind") == "generative":
        network, _ = load_causal(directory, place, dtype)
        model = Verdicts(Policy(Backbone(network), None), facts["yes"], facts["no"])
    else:
        model = RewardModel(Backbone(load_classifier(directory, place, dtype)), combine=facts.get("combine"))
    reward = ModelReward(model, Renderer(load_tokenizer(directory)), directory, same_tokenizer=False)

    def scores(problem: Problem) -> list[float]:
        texts = [solution.text for solution in problem.solutions]
        return [float(value or 0) for value in reward([problem.prompt] * len(texts), texts, {}).values]

    return scores


def simple_judge(name: baselines.Baseline, training: Sequence[Problem]) -> Callable[[Problem], list[float]]:
    """As `klimb.stages.baselines` fits it, for single solutions."""
    features = baselines.FEATURES[name]
    pairs = [(features(a.text), features(b.text)) for problem in training for a, b in problem.pairs]
    seen = Counter(feature for pair in pairs for side in pair for feature in side)
    columns = {feature: place for place, feature in enumerate(f for f, n in seen.items() if n >= 3)}
    weights = baselines._fit(baselines._differences(pairs, columns))
    return lambda problem: [
        sum(float(weights[columns[f]]) * value for f, value in features(s.text).items() if f in columns)
        for s in problem.solutions
    ]


def best(problem: Problem, scores: Sequence[float]) -> float:
    """P(the best is right), ties drawn by lot."""
    top = [s.right for s, score in zip(problem.solutions, scores) if score == max(scores)]
    return sum(top) / len(top)


def votes(problem: Problem) -> list[float]:
    counts = Counter(solution.answer for solution in problem.solutions)
    return [counts[solution.answer] for solution in problem.solutions]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("solutions", type=Path)
    parser.add_argument("language", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/gsm8k-rewards"))
    given = parser.parse_args()
    problems = read(given.solutions)
    training, held_out = ([p for p in problems if is_held_out(p) is part] for part in (False, True))
    judges: dict[str, Callable[[Problem], list[float]]] = {
        kind: judge(model)
        for kind, model in train(training, given.language, given.out / str(given.seed), given.seed).items()
    }
    judges |= {"length alone": simple_judge("length", training), "words alone": simple_judge("bag_of_words", training)}
    judges |= {
        "vote of the four": votes,
        "a draw": lambda p: [0.0] * 4,
        "oracle": lambda p: [s.right for s in p.solutions],
    }
    steps = [label for p in training for s in p.solutions for label in s.steps()[1][:-1]]
    right = sum(solution.right for problem in held_out for solution in problem.solutions)
    print(f"{len(training)} problems to learn from, {len(held_out)} held out; {right} of {4 * len(held_out)} held-out "
          f"solutions are right; of {len(steps):,} training lines before the last, {steps.count(False)} calculate "
          "wrongly")  # fmt: skip
    found = {}
    for name, scores_of in judges.items():
        each = [(problem, scores_of(problem)) for problem in held_out]
        order = [
            [(1 + (a > b) - (a < b)) / 2 for s, a in zip(p.solutions, scores) for t, b in zip(p.solutions, scores)
             if s.right > t.right] for p, scores in each
        ]  # fmt: skip
        pairs, picked = mean_interval(order), mean_interval([[best(*one)] for one in each])
        found[name] = {"pairs": pairs, "best_of_4": picked}
        print(f"{name:18} right above wrong {pairs.mean:.3f} [{pairs.low:.3f}, {pairs.high:.3f}]   "
              f"best of 4 right {picked.mean:.3f} [{picked.low:.3f}, {picked.high:.3f}]", flush=True)  # fmt: skip
    (given.out / f"{given.seed}.json").write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
