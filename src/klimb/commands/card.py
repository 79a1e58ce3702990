"""The model card of an export: what the run's files say, and where they say nothing, that they say nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from klimb.commands.trained import Trained
from klimb.config import dump_config
from klimb.report.text import without_credentials

STAGES = {
    "sft": "supervised fine-tuning", "reward": "reward model on comparisons (Bradley–Terry)",
    "rl": "reinforcement learning", "preference": "direct preference optimisation",
    "online_preference": "preference optimisation on its own samples",
    "distill": "distillation from a teacher",
}  # fmt: skip


def model_card(run: Trained, folder: Path, name: str) -> str:
    """The text of README.md for the model in `folder`."""
    history = run.history()
    base = history[0].source("model") or history[0].config["model"]
    sections = [
        _front_matter(run, folder, base),
        f"# {name}\n\n{_summary(run, folder, base)}",
        "## Use\n\n" + _use(run, folder, name),
        "## Training\n\n" + "\n".join(line for stage in history for line in _stage(stage)),
        "## Figures\n\n" + "\n".join(_figures(run)),
        "## What this card does not know\n\n" + "\n".join(_unknown(run, base)),
        "## Settings\n\nOf the last stage, fully resolved:\n\n```yaml\n"
        + without_credentials(dump_config(run.config)).rstrip() + "\n```",
    ]  # fmt: skip
    return "\n\n".join(sections) + "\n"


def _front_matter(run: Trained, folder: Path, base: str) -> str:
    """The keys that the hub reads. A base that is a folder on somebody's disk has no name there."""
    adapter = (folder / "adapter_config.json").is_file()
    facts: dict[str, Any] = {
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text-classification" if _is_reward(run) else "text-generation",
        "tags": ["klimb", run.result["stage"]],
    }
    if not _is_path(base):
        facts["base_model"] = base
        facts["base_model_relation"] = "adapter" if adapter else "finetune"
    return f"---\n{yaml.safe_dump(facts, sort_keys=False)}---"


def _summary(run: Trained, folder: Path, base: str) -> str:
    versions = run.manifest["versions"]
    kind = "A reward model" if _is_reward(run) else "A language model"
    if (folder / "adapter_config.json").is_file():
        weights = f"The folder holds a LoRA adapter alone; it needs its base model, `{_adapter_base(folder)}`."
    elif run.is_adapter:
        weights = "The LoRA adapter of its last stage is merged into the weights."
    else:
        weights = "The folder holds whole weights."
    dtype = run.manifest["decisions"].get("dtype")
    return (
        f"{kind}, trained from `{base}` with klimb {versions['klimb']} (torch {versions['torch']}, transformers "
        f"{versions['transformers']}). {weights}" + (f" Trained and saved in {dtype}." if dtype else "")
    )  # fmt: skip


def _use(run: Trained, folder: Path, name: str) -> str:
    if _is_reward(run):
        return _USE_REWARD.format(name=name, **json.loads((folder / "reward.json").read_text()))
    adapter = (folder / "adapter_config.json").is_file()
    template = run.conversational is not False and _has_template(folder)
    return _USE.format(
        imports=_IMPORT_PEFT if adapter else "from transformers import AutoModelForCausalLM, AutoTokenizer",
        cls="AutoPeftModelForCausalLM" if adapter else "AutoModelForCausalLM",
        name=name,
        inputs=_CHAT if template else _PLAIN,
        form="conversations, through the chat template that the tokenizer holds"
        if template
        else "plain text, without a chat template",
    )


_USE = """```python
{imports}

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = {cls}.from_pretrained("{name}")
{inputs}
print(tokenizer.decode(model.generate(**inputs, do_sample=True, max_new_tokens=256)[0]))
```

It is used on {form}. Generation ends where `generation_config.json` says: on the tokens that training taught as the
last. In a terminal: `klimb chat {name}`."""
_IMPORT_PEFT = "from peft import AutoPeftModelForCausalLM\nfrom transformers import AutoTokenizer"
_CHAT = """inputs = tokenizer.apply_chat_template([{"role": "user", "content": "…"}], add_generation_prompt=True,
                                       return_tensors="pt", return_dict=True)"""
_PLAIN = 'inputs = tokenizer("…", return_tensors="pt")'
_USE_REWARD = """```python
from transformers import AutoModelForSequenceClassification, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForSequenceClassification.from_pretrained("{name}")
```

One output, a raw score. On the samples that training took as reference its mean was {mean:.4g} and its standard
deviation {std:.4g} (`reward.json`). In klimb: `reward={name}`."""


def _stage(run: Trained) -> Iterator[str]:
    """One stage of the history: its method, its data, its seed."""
    config, result = run.config, run.result
    method = f", `{result['algorithm']}`" if result.get("algorithm") else ""
    adapter = f", LoRA of rank {config['lora']['rank']}" if config.get("lora") else ", all weights"
    steps = f", {result['steps']:,} steps" if "steps" in result else ""
    yield f"- **{STAGES.get(result.get('stage', ''), run.manifest['name'])}**{method}{adapter}{steps}, seed " + (
        f"{run.manifest['seed']}, klimb {run.manifest['versions']['klimb']}, begun {run.manifest['started']}"
    )
    for key, entry in run.manifest["inputs"].items():
        known = f" (SHA-256 `{entry['hash'][:16]}…`)" if entry["hash"] != entry["source"] else ""
        yield f"  - {key.removeprefix('file:') if key.startswith('file:') else key}: `{entry['source']}`{known}"
    for key in ("reward", "gold"):
        if config.get(key) is not None:
            yield f"  - {key}: `{json.dumps(config[key], ensure_ascii=False)}`"
    if dropped := sum(event.get("kind") == "row_dropped" for event in run.lines("events.jsonl")):
        yield f"  - rows dropped because they could not be used: {dropped:,}"


def _figures(run: Trained) -> Iterator[str]:
    """What was measured, on what; a figure that the run does not hold does not appear."""
    rows = [*_held_out(run)]
    if rows:
        yield "| figure | value | measured on |\n|---|---|---|"
        yield from (f"| {figure} | {value} | {where} |" for figure, value, where in rows)
    else:
        yield "Nothing was measured on held-out data."
    last: dict[str, Any] = next(reversed(run.lines("metrics.jsonl")), {})
    seen = [f"{key} {last[key]:.4g}" for key in ("loss", "accuracy", "reward/mean", "kl", "length/mean")
            if isinstance(last.get(key), int | float)]  # fmt: skip
    if seen:
        yield f"\nOn the training data of the last step ({last['step']:,}), no measure of quality: {', '.join(seen)}."
    if _simulated(run):
        yield "\nThe labels behind these figures are simulated: a program, not a person, judged."


def _held_out(run: Trained) -> Iterator[tuple[str, str, str]]:
    evaluation, measure = run.result.get("evaluation") or {}, run.config.get("measure") or {}
    asked = f"{evaluation.get('n', 0):,} samples of {evaluation.get('prompts', 0):,} prompts (`{measure.get('data')}`)"
    for key, judge in (("proxy", "reward"), ("gold", "gold")):
        if evaluation.get(key) is not None:
            low, high = evaluation[f"{key}_low"], evaluation[f"{key}_high"]
            what = f"{key}: `{json.dumps(measure.get(judge), ensure_ascii=False)}`"
            yield what, f"{evaluation[key]:.4g} (95 % interval {low:.4g} to {high:.4g})", asked
    for key, what in (("kl", "KL to the start or reference, nats per sample"), ("length", "tokens per sample"),
                      ("finished", "share that ended of itself")):  # fmt: skip
        if evaluation.get(key) is not None:
            yield what, f"{evaluation[key]:.4g}", asked
    if run.result.get("accuracy") is not None:
        for name, found in {"accuracy": run.result, **run.result.get("baselines", {})}.items():
            what = name if found is run.result else f"accuracy of {name.replace('_', ' ')} alone"
            value = f"{found['accuracy']:.4g}"
            if "accuracy_low" in found:  # runs of earlier versions know no interval
                value += f" (95 % interval {found['accuracy_low']:.4g} to {found['accuracy_high']:.4g})"
            asked = "pairs" if "held_out_pairs" in run.result else "rows"
            yield what, value, f"{run.result[f'held_out_{asked}']:,} held-out {asked}"
    last: dict[str, Any] = next(
        (row for row in reversed(run.lines("metrics.jsonl")) if any(k.startswith("eval/") for k in row)), {}
    )
    for key, value in last.items():
        if key.startswith("eval/") and value is not None and not (key == "eval/accuracy" and _is_reward(run)):
            yield key, f"{value:.4g}", f"held-out data at step {last['step']:,}"


def _unknown(run: Trained, base: str) -> Iterator[str]:
    yield "- Licence: that of the base model and of the data apply; the run does not know them."
    if _is_path(base):
        yield f"- Where the base model comes from: `{base}` is a folder on the disk of who trained it."
    if not _is_reward(run) and not run.result.get("evaluation"):
        yield "- How good its answers are: this run sampled none to measure."
    yield "- Safety and biases: nothing here was measured for them."


def _simulated(run: Trained) -> bool:
    summary = run.path.resolve().parent / "summary.json"
    try:
        return bool(json.loads(summary.read_bytes()).get("simulated_labels")) if summary.is_file() else False
    except ValueError:
        return False


def _is_reward(run: Trained) -> bool:
    return run.result.get("stage") == "reward"


def _is_path(model: str) -> bool:
    return Path(model).exists() or model.startswith((".", "/", "~")) or model.count("/") > 1


def _adapter_base(folder: Path) -> str:
    return str(json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"])


def _has_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").is_file():
        return True
    config = folder / "tokenizer_config.json"
    return config.is_file() and bool(json.loads(config.read_text()).get("chat_template"))
