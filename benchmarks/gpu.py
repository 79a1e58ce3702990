"""klimb on one GPU, beside what the device could do and beside TRL::

    benchmarks/gpu.sh            # on an H200, under 10 minutes: random weights in the shapes of Qwen3 0.6B and 1.7B
    benchmarks/gpu.sh --try      # the same code with a tiny shape on the CPU; its figures say nothing

decode      tokens/s of the rollout engine after the prompts, at 64 and 256 rows of 128 + 256 tokens. Ceiling: every
            step reads the weights once, and what the cache holds of each row and once of each prompt, at 4.3 TB/s
mismatch    |log-prob at sampling − log-prob of the trainer| of the same tokens, in bf16
training    steps of the learner on 64 rows of 1,024 tokens. MFU: 6 FLOPs a parameter and token, and attention's, over
            790 TFLOP/s; nothing that is computed twice counts
grpo        whole steps in turn with TRL on the same weights, as in vs_trl.py: 8 prompts of 128 tokens × 8 completions
            of 128, TRL at the fastest of its precisions and micro-batches that were tried

Memory is the most that torch had allocated, weights included.
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import machine
import torch
from contest import Disagreement, alone, check, environment_of, in_turn, report, settings, steps_needed, summary
from contest import try_settings as try_trl
from jobs import JOBS, Job, write_rows
from transformers import AutoConfig, AutoModelForCausalLM
from worker import EndedEarly, Options

from klimb.batch import Row, TokenBatch
from klimb.lab.scratch import word_tokenizer
from klimb.models.backbone import Backbone
from klimb.models.faces import Policy, policy_logps
from klimb.models.load import load_causal
from klimb.models.probe import probed_policy
from klimb.rollout.engine import Request, finished_groups
from klimb.rollout.local import LocalEngine
from klimb.rollout.sampling import SamplingParams
from klimb.runtime.learner import Learner, Optimizer
from klimb.stages.evaluate import batch_of
from klimb.stages.sft import sft_loss
from klimb.types import Group, Prompt

BYTES_PER_SECOND, FLOPS = 4.3e12, 790e12
"""Of an H200: a copy in its memory, and bf16 products of random numbers."""
SAMPLES, LEARNING_RATE = 8, 1e-10


class Shape(NamedTuple):
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    mlp: int
    vocabulary: int

    def attention_flops(self, seen: int) -> int:
        """Of a forward pass in which `seen` pairs of a token and an earlier one (or itself) meet."""
        return 4 * self.layers * self.heads * self.head_width * seen

    def cache_bytes(self, tokens: float) -> float:
        return 2 * 2 * self.layers * self.kv_heads * self.head_width * tokens


class Plan(NamedTuple):
    shapes: dict[str, Shape]
    device: str
    rows: tuple[int, ...] = (64, 256)
    prompt: int = 128
    completion: int = 256
    training: tuple[int, int] = (64, 1024)
    token_budget: int = 16384
    job: Job = JOBS["grpo"]._replace(prompt_tokens=(127, 127), max_tokens=128)
    micro_batches: tuple[int, ...] = (64, 16)
    pairs: int = 7


H200 = Plan(
    {
        "qwen3-0.6b": Shape(1024, 28, 16, 8, 128, 3072, 151_936),
        "qwen3-1.7b": Shape(2048, 28, 16, 8, 128, 6144, 151_936),
    },
    "cuda",
)
TRY = Plan(
    {"tiny": Shape(64, 2, 4, 2, 16, 128, 512)}, "cpu", rows=(8, 16), prompt=8, completion=16, training=(4, 32),
    token_budget=256, job=JOBS["grpo"]._replace(rows=2, whole=16, prompt_tokens=(7, 7), max_tokens=8),
    micro_batches=(16,), pairs=1,
)  # fmt: skip


def main() -> None:
    arguments = parse()
    plan = TRY if arguments.try_ else H200
    if plan.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("torch sees no CUDA device here: not run (--try runs a tiny shape on the CPU)")
    until = time.monotonic() + 60 * arguments.minutes
    results = []
    for i, (name, shape) in enumerate(plan.shapes.items()):
        report(f"{name}:")
        share = (until - time.monotonic()) / (len(plan.shapes) - i)
        result = measure(name, shape, plan, time.monotonic() + share)
        machine.keep(result, arguments.results / f"gpu-{name}.json")
        results.append(result)
    print(*table(results), sep="\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--try", dest="try_", action="store_true", help="a tiny shape on the CPU, kept nowhere")
    parser.add_argument("--minutes", type=float, default=8.5, help="no further pair of steps begins later")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results", metavar="FOLDER")
    arguments = parser.parse_args()
    if arguments.try_:
        arguments.results = Path(tempfile.mkdtemp(prefix="gpu-try-"))
    return arguments


def measure(name: str, shape: Shape, plan: Plan, until: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="gpu-") as folder:
        parameters = make_model(Path(folder), shape, plan.device)
        policy = load(f"{folder}/model", plan.device)
        decoded = [decode(policy, rows, shape, plan, parameters) for rows in plan.rows]
        trained = training(policy, shape, plan, parameters)
        del policy
        gc.collect()
        if plan.device == "cuda":
            torch.cuda.empty_cache()  # the sides are processes of their own and want the memory
        grpo = against_trl(folder, name, parameters, plan, until)
    return {
        "job": name, "dtype": "bf16", "parameters": parameters, "decode": decoded, "training": trained, "grpo": grpo,
        "device": torch.cuda.get_device_name() if plan.device == "cuda" else "cpu",
        "machine": machine.facts(torch.get_num_threads(), "default"),
    }  # fmt: skip


def make_model(folder: Path, shape: Shape, device: str) -> int:
    """model/ and, a little away from it for the check of the numbers, reference/; returns the number of parameters.

    Nothing stops a completion but its length: the end token is one of a vocabulary of equals.
    """
    tokenizer = word_tokenizer([f"w{i}" for i in range(shape.vocabulary - 3)])
    config = AutoConfig.for_model(
        "qwen3", vocab_size=shape.vocabulary, hidden_size=shape.hidden, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, head_dim=shape.head_width,
        intermediate_size=shape.mlp, max_position_embeddings=4096, tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    tokenizer.save_pretrained(folder / "model")
    model.save_pretrained(folder / "model")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.03 * float(parameter.float().std(correction=0)))
    model.save_pretrained(folder / "reference")
    tokenizer.save_pretrained(folder / "reference")
    return sum(parameter.numel() for parameter in model.parameters())


def load(path: str, device: str) -> Policy:
    network, adapter = load_causal(path, torch.device(device), torch.bfloat16)
    policy, line = probed_policy(Backbone(network, adapter), None)
    report(f"  {line}")
    return policy


# Rollout ------------------------------------------------------------------------------------------------------------


def decode(policy: Policy, rows: int, shape: Shape, plan: Plan, parameters: int) -> dict[str, Any]:
    """Once to warm up, once timed: from the first tokens, which the prompts give, to the last."""
    for _ in range(2):
        groups, seconds, tokens = timed_rollout(policy, rows, plan, shape.vocabulary)
    held = rows * plan.completion / 2 + rows / SAMPLES * plan.prompt  # tokens in the cache, on average over the steps
    ceiling = rows * BYTES_PER_SECOND / (2 * parameters + shape.cache_bytes(held))
    found = {
        "rows": rows, "tokens_per_s": round(tokens / seconds, 1), "ceiling": round(ceiling, 1),
        "share": round(tokens / seconds / ceiling, 4), "mismatch": mismatch(policy, groups, plan.token_budget),
        "mb": peak_mb(plan.device),
    }  # fmt: skip
    report(f"  decode, {rows} rows: {found['tokens_per_s']:.0f} tokens/s of {ceiling:.0f}")
    return found


def timed_rollout(policy: Policy, rows: int, plan: Plan, vocabulary: int) -> tuple[list[Group], float, int]:
    """Seconds and tokens of what came after the first token of each row."""
    draw = random.Random(0)
    params = SamplingParams(plan.completion, frozenset())
    prompts = [
        Prompt(f"p{i}", [draw.randrange(3, vocabulary) for _ in range(plan.prompt)], "") for i in range(rows // SAMPLES)
    ]
    noted: list[tuple[float, int]] = []

    def on_tokens(tokens: int) -> None:
        if not noted:
            synchronize(plan.device)
        noted.append((time.perf_counter(), tokens))

    engine = LocalEngine(policy, lambda tokens: "", max_rows=rows, on_tokens=on_tokens)
    engine.submit([Request(prompt, SAMPLES, params, seed=0) for prompt in prompts])
    groups = [group for _, group in finished_groups(engine.stream())]
    synchronize(plan.device)
    return groups, time.perf_counter() - noted[0][0], sum(tokens for _, tokens in noted[1:])


def mismatch(policy: Policy, groups: list[Group], budget: int) -> dict[str, float]:
    batch = batch_of(groups)
    trainer = policy_logps(policy, batch, budget=budget).logps.float().cpu()[batch.mask]
    sampled = torch.tensor([logp for group in groups for sample in group.samples for logp in sample.logps])
    gaps = (trainer - sampled).abs()
    return {"median": float(gaps.median()), "p99": float(gaps.quantile(0.99)), "max": float(gaps.max())}


# Training -----------------------------------------------------------------------------------------------------------


def training(policy: Policy, shape: Shape, plan: Plan, parameters: int) -> dict[str, Any]:
    """Five steps after two; memory: fp32 masters and moments, bf16 weights and gradients, activations."""
    rows, length = plan.training
    draw = random.Random(0)
    texts = [[draw.randrange(3, shape.vocabulary) for _ in range(length)] for _ in range(rows)]
    batch = TokenBatch.from_rows(
        [[Row(text[:1], text[1:], [True] * (length - 1))] for text in texts], range(rows), [str(i) for i in range(rows)]
    )
    learner = Learner(policy.trainable(), Optimizer(), lr=LEARNING_RATE, total_steps=7, budget=plan.token_budget)
    times = []
    for _ in range(7):
        start = time.perf_counter()
        learner.step(batch, lambda micro, totals: sft_loss(policy, micro, totals))
        synchronize(plan.device)
        times.append(time.perf_counter() - start)
    seconds = statistics.median(times[2:])
    attention = 3 * shape.attention_flops(rows * length * (length + 1) // 2)
    flops = 6 * parameters * rows * length + attention  # the embedding is the head: its parameters multiply once
    found = {
        "rows": rows, "length": length, "seconds": seconds, "tokens_per_s": round(rows * length / seconds, 1),
        "tflops": flops / seconds / 1e12, "mfu": flops / seconds / FLOPS, "mb": peak_mb(plan.device),
    }  # fmt: skip
    report(f"  training: {found['tokens_per_s']:.0f} tokens/s, MFU {found['mfu']:.1%}")
    return found


# GRPO beside TRL ----------------------------------------------------------------------------------------------------


def against_trl(folder: str, name: str, parameters: int, plan: Plan, until: float) -> dict[str, Any]:
    """Figures as those of vs_trl.py; klimb's alone where TRL is not installed or cannot run, with the reason."""
    words = [f"w{i}" for i in range(plan.shapes[name].vocabulary - 3)]
    write_rows(Path(folder) / "rows.jsonl", plan.job, words, steps_needed(plan.pairs))
    threads = torch.get_num_threads()
    options: Options = {
        "folder": folder, "job": "grpo", "size": name, "dtype": "bf16", "architecture": "qwen3", "beta": 0.0,
        "threads": threads, "malloc": "default", "device": plan.device, "change": plan.job._asdict(),
        "token_budget": plan.token_budget, "parameters": parameters,
    }  # fmt: skip
    environment = environment_of(threads, "default")
    try:
        if machine.version_of("trl") is None:
            raise EndedEarly("TRL is not installed here")
        agreement = check(options, environment)
        candidates = settings(("grpo",), "bf16", sizes=plan.micro_batches)
        tried = try_trl(options, environment, candidates, box=min(60, (until - time.monotonic()) / 2))
        steps = in_turn(options, tried[0]["settings"], environment, plan.pairs, until)
        return summary(options, tried, *steps) | {"agreement": agreement}
    except (Disagreement, EndedEarly) as error:
        report(f"  no comparison with TRL: {error}")
        taken = alone(options, environment, plan.pairs)
        seconds = statistics.median(step["seconds"] for step in taken)
        return {"why_no_trl": str(error), "klimb_s": seconds, "klimb_mb": taken[-1]["mb"]}


# The table ----------------------------------------------------------------------------------------------------------


def table(results: list[dict[str, Any]]) -> list[str]:
    head = ("", *(result["job"] for result in results))
    lines: list[tuple[str, ...]] = [head, ("---",) * len(head), ("device", *(result["device"] for result in results))]
    for decoded in zip(*(result["decode"] for result in results), strict=True):
        rows = decoded[0]["rows"]
        rates = (f"{d['tokens_per_s']:.0f} ({d['share']:.1%} of {d['ceiling']:.0f})" for d in decoded)
        gaps = ("{median:.1e}, {p99:.1e}, {max:.1e}".format(**d["mismatch"]) for d in decoded)
        lines.append((f"decode, {rows} rows: tokens/s (of the ceiling)", *rates))
        lines.append((f"decode, {rows} rows: log-prob mismatch (median, p99, max)", *gaps))
        lines.append((f"decode, {rows} rows: memory", *(f"{d['mb']:.0f} MB" for d in decoded)))
    trained = [result["training"] for result in results]
    lines.append(("training: tokens/s (MFU)", *(f"{t['tokens_per_s']:.0f} ({t['mfu']:.1%})" for t in trained)))
    lines.append(("training: memory", *(f"{t['mb']:.0f} MB" for t in trained)))
    lines.append(("GRPO step", *(_grpo(result["grpo"]) for result in results)))
    return ["| " + " | ".join(line) + " |" for line in lines]


def _grpo(found: dict[str, Any]) -> str:
    if "why_no_trl" in found:
        return (
            f"klimb {found['klimb_s']:.2f} s, {found['klimb_mb']:.0f} MB; no TRL: {found['why_no_trl'].splitlines()[0]}"
        )
    low, high = found["interval"]
    return (f"TRL {found['trl_s']:.2f} s, klimb {found['klimb_s']:.2f} s: {found['ratio']:.2f} ({low:.2f}–{high:.2f}); "
            f"{found['trl_mb']:.0f} and {found['klimb_mb']:.0f} MB")  # fmt: skip


# The device ---------------------------------------------------------------------------------------------------------


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def peak_mb(device: str) -> float:
    """Since it was last asked for."""
    if device != "cuda":
        return 0.0
    peak = torch.cuda.max_memory_allocated() / 2**20
    torch.cuda.reset_peak_memory_stats()
    return peak


if __name__ == "__main__":
    main()
