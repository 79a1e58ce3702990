"""What a row of the table of algorithms costs beside the model's passes::

    python benchmarks/row_costs.py --size M --threads 2 [--json FILE]

The row: credit, what is decided over the whole update, the loss and its gradient with respect to log π, of B
completions of T tokens. The passes: forward and backward of the policy over these tokens, measured on one micro-batch
and multiplied; no rollout, no reference, no critic, no optimiser, all of which a step has besides. Rows and passes
take turns; the medians are compared. Exit code 1: a row costs more than 2 % of the passes.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import machine
import torch
from jobs import JOBS
from torch import Tensor
from work import SIZES, prepare

from klimb.batch import BatchTotals, Row, TokenBatch
from klimb.models.backbone import Backbone
from klimb.models.faces import Policy
from klimb.models.load import load_causal
from klimb.objective import ALGORITHMS, Algorithm, assign_credit, policy_loss, update_columns

ALLOWED = 0.02
GROUP = 8


class Shape(NamedTuple):
    samples: int
    tokens: int


SHAPES = (Shape(64, 128), Shape(512, 512))


def inputs(shape: Shape) -> dict[str, Tensor]:
    """Policies near one another, ragged completions from 1 to T tokens, groups of eight."""
    draw = torch.Generator().manual_seed(0)
    length = torch.randint(1, shape.tokens + 1, (shape.samples, 1), generator=draw)
    length[0] = shape.tokens
    mask = torch.arange(shape.tokens) < length
    base = -torch.rand(shape, generator=draw) - 0.1

    def near() -> Tensor:
        return torch.where(mask, base + 0.05 * torch.randn(shape, generator=draw), 0.0)

    given = {name: near() for name in ("logps", "old_logps", "behavior_logps", "ref_logps", "values")}
    return given | {
        "mask": mask, "group": torch.arange(shape.samples) // GROUP, "entropy": torch.where(mask, -base, 0.0),
        "collisions": torch.where(mask, base.exp(), 0.0), "scores": torch.randn(shape.samples, generator=draw),
        "parts": torch.randn(shape.samples, 2, generator=draw), "part_weights": torch.ones(2),
        "baseline": torch.zeros(shape.samples),
    }  # fmt: skip


def row(algorithm: Algorithm, given: dict[str, Tensor]) -> None:
    """One update, but for the model."""
    mask, logps = given["mask"], given["logps"].clone().requires_grad_()
    names = ("scores", "group", "ref_logps", "values", "parts", "part_weights", "baseline", "collisions")
    columns = {name: given[name] for name in names}
    advantages = assign_credit(algorithm, mask=mask, logps=given["behavior_logps"], **columns).advantages
    policies = {name: given[name] for name in ("old_logps", "behavior_logps", "entropy")}
    decided = update_columns(
        algorithm, logps=given["logps"], advantages=advantages, scores=given["scores"], mask=mask, **policies
    )
    totals = BatchTotals.of(mask, given["group"])
    loss, _ = policy_loss(
        algorithm, logps=logps, advantages=advantages, mask=mask, totals=totals, ref_logps=given["ref_logps"],
        **policies, **decided,
    )  # fmt: skip
    loss.backward()


def passes(policy: Policy, shape: Shape, tokens: int, budget: int) -> tuple[Callable[[], None], float]:
    """Forward and backward over full completions of T tokens in one micro-batch, and how many real tokens of the
    whole update come to one of these."""
    count = max(budget // shape.tokens, 1)
    line = [3 + i % 100 for i in range(shape.tokens)]
    rows = [[Row([3], line, [True] * shape.tokens)] for _ in range(count)]
    mask = torch.ones(count, shape.tokens, dtype=torch.bool)
    batch = TokenBatch(rows, mask, torch.arange(count), [str(i) for i in range(count)])

    def once() -> None:
        policy(batch).logps.sum().backward()
        policy.zero_grad()

    return once, tokens / mask.numel()


def seconds(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(policy: Policy, shape: Shape, budget: int, rounds: int) -> dict[str, Any]:
    given = inputs(shape)
    once, times = passes(policy, shape, int(given["mask"].sum()), budget)
    rows = {name: algorithm.resolve(max_length=shape.tokens) for name, algorithm in ALGORITHMS.items()}
    taken: dict[str, list[float]] = defaultdict(list)
    for number in range(rounds + 1):
        for name, algorithm in rows.items():
            model, own = seconds(once), seconds(lambda algorithm=algorithm: row(algorithm, given))
            if number:  # the first round warms up
                taken["model"].append(times * model)
                taken[name].append(own)
    middle = {name: statistics.median(values) for name, values in taken.items()}
    shares = {name: middle[name] / middle["model"] for name in rows}
    return {
        "samples": shape.samples, "tokens": shape.tokens, "model_ms": round(1e3 * middle["model"], 2),
        "rows_ms": {name: round(1e3 * middle[name], 3) for name in rows},
        "shares": {name: round(share, 5) for name, share in shares.items()},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="M")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=5, help="timed, after one that is not")
    parser.add_argument("--token-budget", type=int, default=640, help="the micro-batch, in flat tokens")
    parser.add_argument("--json", type=Path, metavar="FILE")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    longest = max(shape.tokens for shape in SHAPES)
    with tempfile.TemporaryDirectory(prefix="row-costs-") as folder:
        prepare(Path(folder), asked.size, JOBS["grpo"]._replace(max_tokens=longest), steps=1)
        network, _ = load_causal(f"{folder}/model", torch.device("cpu"), torch.float32)
        found = [measure(Policy(Backbone(network), None), shape, asked.token_budget, asked.rounds) for shape in SHAPES]
    print(f"{'ms, share of the passes':24}" + "".join(f"{f'[{s.samples}, {s.tokens}]':>20}" for s in SHAPES))
    print(f"{'forward and backward':24}" + "".join(f"{each['model_ms']:12.1f}{'':8}" for each in found))
    for name in ALGORITHMS:
        print(f"{name:24}" + "".join(f"{each['rows_ms'][name]:12.2f}{each['shares'][name]:8.2%}" for each in found))
    worst = max(share for each in found for share in each["shares"].values())
    print(f"at most {worst:.2%} of the passes; {ALLOWED:.0%} are allowed")
    result = {"size": asked.size, "token_budget": asked.token_budget, "worst": worst, "shapes": found}
    machine.keep(result | {"machine": machine.facts(asked.threads, "default")}, asked.json)
    sys.exit(int(worst > ALLOWED))


if __name__ == "__main__":
    main()
