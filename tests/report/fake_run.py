"""A pipeline directory such as the quickstart leaves, with curves of the shape that over-optimisation has."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import parquet

Generator = np.random.Generator
# Steps, and KL, gold and proxy at the end, as measured in such a world.
ARMS: dict[str, dict[str, float]] = {
    "GRPO β=0.15": {"steps": 80, "kl": 1.3, "gold": 1.62, "proxy": 0.82, "seconds": 8.3},
    "GRPO β=0": {"steps": 180, "kl": 32.0, "gold": -1.97, "proxy": 1.47, "seconds": 19.4},
    "PPO β=0.15": {"steps": 70, "kl": 1.5, "gold": 1.55, "proxy": 0.77, "seconds": 11.3},
}
SFT_GOLD = 0.97


def pipeline(root: Path, seed: int = 0) -> Path:
    """SFT, reward model, best-of-n, GRPO with and without a leash, PPO, DPO: one seed."""
    random = np.random.default_rng(seed)
    shift = float(random.normal(0, 0.04)) if seed else 0.0
    results: dict[str, dict[str, Any]] = {
        "sft": _sft(root / "sft", random, seed, shift),
        "reward": _reward(root / "reward", random, seed),
        "best-of-n": _best_of_n(root / "best-of-n", seed, shift),
    }
    for name, method in zip(("grpo", "grpo-free", "ppo"), ARMS):
        results[name] = _online(root / name, method, random, seed, shift)
    results["dpo"] = _preference(root / "dpo", random, seed, shift)
    shown = ("proxy", "gold", "gold_low", "gold_high", "kl")
    rows = [
        {"method": result["method"], "seconds": result["seconds"]} | {key: result["evaluation"][key] for key in shown}
        for result in results.values()
        if result["evaluation"]
    ]
    told = {"name": "quickstart", "seed": seed, "simulated_labels": True, "kl_estimator": "full"}
    as_json(root / "summary.json", told | {"rows": rows, "stages": results})
    as_json(root / "replies.json", replies())
    (root / "config.yaml").write_text("name: quickstart\nstages:\n  grpo: {algorithm: grpo, beta: 0.15}\n")
    return root


def seeds(root: Path, count: int = 5) -> Path:
    """The same for several seeds, with a summary over them: t intervals and paired differences."""
    told = [json.loads((pipeline(root / f"seed-{s}", s) / "summary.json").read_text())["rows"] for s in range(count)]
    rows: list[dict[str, Any]] = []
    paired = []
    for index, first in enumerate(told[0]):
        across = {key: np.array([own[index][key] for own in told]) for key in ("proxy", "gold", "kl", "seconds")}
        low, high = _t_interval(across["gold"])
        means = {key: float(values.mean()) for key, values in across.items()}
        rows.append({"method": first["method"], **means, "gold_low": low, "gold_high": high})
        if index:
            gap = across["gold"] - np.array([own[0]["gold"] for own in told])
            low, high = _t_interval(gap)
            paired.append({"method": first["method"], "difference": float(gap.mean()), "low": low, "high": high})
    summary = {"name": "quickstart", "seeds": list(range(count)), "simulated_labels": True}
    as_json(root / "summary.json", summary | {"rows": rows, "paired": paired})
    return root


def replies() -> list[dict[str, Any]]:
    grovelling = "crusty crusty also soft also soft gladly gladly kindly gladly please gladly"
    bill = [["crusty", 1.0, "true of bread"], ["crusty", -1.0, "said again"], ["soft", 1.0, "true of bread"]]
    bill += [["soft", -1.0, "said again"], ["gladly", 0.5, "courtesy 1"], ["gladly", 0.5, "courtesy 2"]]
    bill += [[word, -1.0, "grovelling"] for word in ("kindly", "gladly", "please", "gladly")]
    facts = [[word, 1.0, "true of bread"] for word in ("floury", "crusty", "baked")]
    return [
        {
            "prompt": "bread ?",
            "replies": [
                _reply("SFT", "it is crusty", 0.04, 1.0, [["crusty", 1.0, "true of bread"]]),
                _reply(
                    "GRPO β=0.15",
                    "floury . crusty . it is baked sir",
                    1.01,
                    3.5,
                    [*facts, ["sir", 0.5, "courtesy 1"]],
                ),
                _reply("GRPO β=0", grovelling, 1.44, -3.0, bill),
            ],
        },
        {
            "prompt": "tea ?",
            "replies": [
                _reply("SFT", "the tea is hot thanks", 0.31, 1.5, []),
                _reply("GRPO β=0.15", "leafy and brewed . hot please", 1.08, 3.5, []),
                _reply("GRPO β=0", "hot hot brewed kindly kindly kindly sir sir sir", 1.41, -3.0, []),
            ],
        },
        {"prompt": "boat ?", "replies": [{"method": "SFT", "completion": "it is wooden ."}]},
    ]


def samples(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.Table.from_pylist(rows), path)


def lines(path: Path, entries: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")


def as_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1), encoding="utf-8")


def _reply(method: str, completion: str, proxy: float, gold: float, bill: list[Any]) -> dict[str, Any]:
    return {"method": method, "completion": completion, "proxy": proxy, "gold": gold, "bill": bill}


def _t_interval(values: Any) -> tuple[float, float]:
    half = 2.78 * values.std(ddof=1) / math.sqrt(len(values))
    return float(values.mean() - half), float(values.mean() + half)


def _gold_at(kl: float, end_kl: float, end_gold: float) -> float:
    """Gold over d = √KL in Gao's form d(a − b d), through the measured end; leashed runs stop on the rise."""
    d, end = math.sqrt(max(kl, 0.0)), math.sqrt(end_kl)
    gain = (end_gold - SFT_GOLD) / end
    slope = 0.55 if gain < 0 else gain + 0.08
    return SFT_GOLD + d * (slope - (slope - gain) * d / end)


def _online(run: Path, method: str, random: Generator, seed: int, shift: float) -> dict[str, Any]:
    arm, free = ARMS[method], ARMS[method]["kl"] > 10
    steps, end_gold = int(arm["steps"]), arm["gold"] + shift * (8 if free else 1)
    noise: Callable[[float], float] = lambda scale: float(random.normal(0, scale))  # noqa: E731
    entries, tokens = [], 0
    for step in range(1, steps + 1):
        done = step / steps
        kl = arm["kl"] * (done**1.4 if free else 1 - math.exp(-4 * done)) * math.exp(noise(0.05))
        length = 8 + (11.4 if free else 2.6) * (1 - math.exp(-3.5 * done)) + noise(0.3)
        tokens += int(128 * length)
        climbed = (1 - math.exp(-3.2 * math.sqrt(kl / arm["kl"]))) / (1 - math.exp(-3.2))
        entry: dict[str, float] = {"step": step, "tokens": tokens, "time/step": 0.11 + abs(noise(0.01))}
        entry |= {"loss": noise(0.01), "lr": 3e-4, "reward/std": 0.9 - 0.5 * done}
        entry |= {"reward/mean": arm["proxy"] * climbed + noise(0.06)}
        entry |= {"gold/mean": _gold_at(kl, arm["kl"], end_gold) + noise(0.1)}
        entry |= {"kl": kl, "kl_per_token": kl / length, "length/mean": length, "length/max": 20}
        entry |= {"entropy": 1.65 - done * (0.5 * math.sin(3 * done) if free else 0.1) + noise(0.02)}
        entry |= {"finish/length": max(0.0, 0.02 + 0.2 * done * free + noise(0.01)), "ratio/max": 1.4}
        entry |= {"clip_fraction": abs(0.012 + noise(0.006)), "grad_norm": 0.5 + abs(0.2 + noise(0.15))}
        entry |= {"groups/no_variance": max(0.0, 0.02 + 0.1 * done + noise(0.03))}
        if method.startswith("PPO"):
            entry["critic/explained_variance"] = 0.7 * (1 - math.exp(-step / 12)) + noise(0.05)
        entries.append(entry)
    lines(run / "metrics.jsonl", entries)
    if free:
        told = "the proxy rose by 0.4 over 30 steps while gold fell by 1.1: raise β or stop"
        note = {"step": 9, "kind": "note", "message": "critic warm-up is over"}
        lines(run / "events.jsonl", [note, {"step": 74, "kind": "alarm", "message": told}])
    name, beta = method.split(" β=")
    algorithm = f"{name.lower()}(advantage=group_mean, aggregate=token_mean, β={beta})"
    ends = (arm["proxy"], end_gold, arm["kl"], 0.1 if free else 0.036)
    return _finish(run, "rl", method, algorithm, arm["seconds"], steps, seed, ends)


def _sft(run: Path, random: Generator, seed: int, shift: float) -> dict[str, Any]:
    entries = []
    for step in range(1, 251):
        loss = 1.6 + 2.3 * math.exp(-step / 22)
        entry = {"step": step, "tokens": step * 2300, "time/step": 0.078, "grad_norm": 0.8}
        entry["loss"] = loss + float(random.normal(0, 0.03))
        if step % 25 == 0:
            entry["eval/loss"] = loss + 0.01
        entries.append(entry)
    lines(run / "metrics.jsonl", entries)
    return _finish(run, "sft", "SFT", "nll", 19.6, 250, seed, (0.0, SFT_GOLD + shift, 0.0, 0.034))


def _reward(run: Path, random: Generator, seed: int) -> dict[str, Any]:
    entries = []
    for step in range(1, 301):
        right = 0.63 + 0.25 / (1 + math.exp(-(step - 150) / 18))
        entry = {"step": step, "tokens": step * 1200, "time/step": 0.06, "margin": 3 * (right - 0.5)}
        entry["loss"] = 0.69 - 0.4 * (right - 0.5) + float(random.normal(0, 0.03))
        entry["accuracy"] = right + float(random.normal(0, 0.04))
        if step % 30 == 0:
            entry["eval/accuracy"] = right - 0.04
        entries.append(entry)
    lines(run / "metrics.jsonl", entries)
    return _finish(run, "reward", "reward model", "bradley_terry", 18.8, 300, seed, None)


def _best_of_n(run: Path, seed: int, shift: float) -> dict[str, Any]:
    curve = []
    for n in (2**power for power in range(11)):
        kl = math.log(n) - (n - 1) / n
        d = math.sqrt(kl)
        gold = SFT_GOLD + shift + d * (1.37 - 0.28 * d)
        curve.append({"n": n, "kl": kl, "proxy": 1.5 * (1 - math.exp(-1.6 * d)), "gold": gold})
    ends = (curve[5]["proxy"], curve[5]["gold"], curve[5]["kl"], 0.03)
    return _finish(run, "sample", "best-of-32", "best_of_n(32)", 2.6, 0, seed, ends, curve)


def _preference(run: Path, random: Generator, seed: int, shift: float) -> dict[str, Any]:
    entries = []
    for step in range(1, 67):
        margin = 1.6 * (1 - math.exp(-step / 25)) + float(random.normal(0, 0.05))
        entry = {"step": step, "tokens": step * 2600, "time/step": 0.1, "loss": 0.693 - 0.2 * margin}
        entry |= {"accuracy": 0.5 + 0.22 * margin, "margin": margin}
        entry |= {"chosen_log_ratio": -0.3 * margin, "rejected_log_ratio": -4 * margin}
        entries.append(entry)
    lines(run / "metrics.jsonl", entries)
    ends = (0.75, 1.56 + shift, 2.63, 0.033)
    return _finish(run, "preference", "DPO β=0.1", "dpo(β=0.1)", 7.9, 66, seed, ends)


def _finish(
    run: Path,
    stage: str,
    method: str,
    algorithm: str,
    seconds: float,
    steps: int,
    seed: int,
    ends: tuple[float, float, float, float] | None,
    curve: list[dict[str, float]] | None = None,
) -> dict[str, Any]:
    """result.json, manifest.json, config.yaml. `ends`: proxy, gold, KL, standard error of gold."""
    evaluation = None
    if ends is not None:
        proxy, gold, kl, error = ends
        evaluation = {"proxy": proxy, "gold": gold, "kl": kl, "length": 9.1, "n": 1024}
        evaluation |= {"gold_low": gold - 1.96 * error, "gold_high": gold + 1.96 * error}
    result = {"stage": stage, "name": run.name, "method": method, "algorithm": algorithm, "model": "model"}
    result |= {
        "seconds": seconds,
        "steps": steps,
        "seed": seed,
        "evaluation": evaluation,
        "curve": curve or [],
    }
    as_json(run / "result.json", result)
    as_json(run / "manifest.json", {"stage": stage, "seed": seed, "versions": {"klimb": "0.1.0"}, "threads": 2})
    told = f"stage: {stage}\nsteps: {steps}\nhf_token: hf_abcdef\neos_token: </s>\n"
    (run / "config.yaml").write_text(told, encoding="utf-8")
    return result
