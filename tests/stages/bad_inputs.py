"""What can be wrong with what klimb is given, one command each; run as a script it writes docs/ERRORS.md.

Every command stands in a folder with a model (`base`), data and rewards that are right, and one thing that is not.
"""

# ruff: noqa: E501
from __future__ import annotations

import gzip
import json
import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pyarrow
from pyarrow import parquet
from transformers import AutoTokenizer
from world import Said, World, klimb, make_world, write

from klimb.lab.scratch import make_model, word_tokenizer

Prepare = Callable[[], object]


class Bad(NamedTuple):
    """One mistake. `names` is what the message has to point at: a file, a row, a key."""

    situation: str
    command: str
    names: tuple[str, ...] = ()
    prepare: Prepare = lambda: None
    foreign: bool = False
    """A part of the message is another library's or the machine's, and may read otherwise elsewhere."""

    def say(self) -> Said:
        """What klimb says to it, standing in a furnished folder. With --json it tells no progress."""
        first, *rest = shlex.split(self.command)
        quiet = [] if first in ("report", "new", "schema", "completion") else ["--json"]
        said = klimb(*USUAL.get(first, first).split(), *rest, *quiet)
        return said._replace(err=said.err.replace(f"{Path.cwd()}/", "").replace(str(Path.cwd()), "."))


_FEW = "steps=1 threads=1 device=cpu"
_RL = (
    f"model=base data=prompts.jsonl reward=rewards.py:count prompts_per_step=2 samples_per_prompt=4 max_tokens=4 {_FEW}"
)
USUAL = {
    "SFT": f"sft model=base data=demonstrations.jsonl batch_size=4 {_FEW}",
    "DPO": f"dpo model=base data=preferences.jsonl batch_size=4 {_FEW}",
    "PREFERENCE": f"preference model=base data=preferences.jsonl batch_size=4 {_FEW}",
    "REWARD": f"reward model=base data=preferences.jsonl batch_size=4 {_FEW}",
    "GRPO": f"grpo {_RL}",
    "PPO": f"ppo {_RL}",
    "NASH": f"nash_md {_RL}",
    "SAMPLE": "sample model=base data=prompts.jsonl max_tokens=4 threads=1 device=cpu",
    "TRUST": "evaluate data=preferences.jsonl threads=1 device=cpu",
    "AVERAGE": "average threads=1 device=cpu",
    "LABEL": "label model=base data=bad.jsonl threads=1 device=cpu",
    "EVALUATE": "evaluate model=base measure.data=prompts.jsonl measure.max_tokens=4 threads=1 device=cpu",
}


def file(name: str, text: str | bytes) -> Prepare:
    return lambda: Path(name).write_bytes(text.encode() if isinstance(text, str) else text)


def rows(*values: object) -> Prepare:
    return file("bad.jsonl", "".join(json.dumps(value) + "\n" for value in values))


def cut_table() -> None:
    parquet.write_table(pyarrow.table({"prompt": ["a ?"], "completion": ["b"]}), "bad.parquet")
    Path("bad.parquet").write_bytes(Path("bad.parquet").read_bytes()[:-30])


def parts() -> None:
    """As `datasets` saves a DatasetDict."""
    Path("parts/test").mkdir(parents=True)
    Path("parts/dataset_dict.json").write_text('{"splits": ["test"]}')


def recipe(stages: str, more: str = "") -> Prepare:
    return file("bad.yaml", f"name: bad\nthreads: 1\ndevice: cpu\n{more}stages:\n{stages}")


def reward(body: str, name: str = "score") -> Prepare:
    return file("bad.py", f"import os, time\ndef {name}(prompts, completions, **_):\n    {body}\n")


def empty() -> None:
    Path("empty").mkdir()


ANSWERS = rows({"prompt": "a ?", "completions": ["b", "c"]})

GOOD_STAGE = "  sft: {stage: sft, model: base, data: demonstrations.jsonl, steps: 1, batch_size: 4}\n"


def broken_config() -> None:
    shutil.copytree("base", "broken", symlinks=False)
    Path("broken/config.json").write_text('{"model_type": "gpt2", ')


def no_weights() -> None:
    shutil.copytree("base", "broken", symlinks=False)
    Path("broken/model.safetensors").unlink()


def too_wide() -> None:
    """Terabytes, by its config."""
    shutil.copytree("base", "broken", symlinks=False)
    config = Path("broken/config.json")
    config.write_text(json.dumps({**json.loads(config.read_text()), "n_embd": 1 << 18, "n_layer": 4}))


def orphaned_adapter() -> None:
    klimb(*USUAL["SFT"].split(), "lora.rank=2", "out=tuned")
    settings = Path("tuned/model/adapter_config.json")
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "base_model_name_or_path": "./gone"}))


def tuned() -> None:
    klimb(*USUAL["SFT"].split(), "lora.rank=2", "out=tuned")


def small_vocabulary() -> None:
    shutil.copytree("base", "broken", symlinks=False)
    tokenizer = AutoTokenizer.from_pretrained("base")
    tokenizer.add_tokens(["zebra"])
    tokenizer.save_pretrained("broken")


def without_eos() -> None:
    shutil.copytree("base", "broken", symlinks=False)
    tokenizer = AutoTokenizer.from_pretrained("base")
    tokenizer.eos_token = None
    tokenizer.save_pretrained("broken")


def template(source: str) -> Prepare:
    """A model with this chat template, and a conversation for it."""

    def prepare() -> None:
        shutil.copytree("base", "broken", symlinks=False)
        Path("broken/chat_template.jinja").write_text(source)
        rows({"messages": [{"role": "user", "content": "a ?"}, {"role": "assistant", "content": "b"}]})()

    return prepare


TURNS = "{% for m in messages %}{{ m.content }} {{ eos_token }}{% endfor %}"
NESTS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


def own_code() -> None:
    shutil.copytree("base", "broken", symlinks=False)
    settings = json.loads(Path("broken/config.json").read_text())
    code = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    Path("broken/config.json").write_text(json.dumps({**settings, "model_type": "own", "auto_map": code}))
    Path("broken/own.py").write_text("open('ran', 'w')")


def code_elsewhere() -> None:
    own_code()
    config = Path("broken/config.json")
    config.write_text(config.read_text().replace("own.OwnModel", "somebody/else--own.OwnModel"))


def tied() -> None:
    tokenizer = AutoTokenizer.from_pretrained("base")
    make_model("tied", tokenizer=tokenizer, architecture="llama", hidden=16, layers=1, heads=2, mlp=32, context=24,
               seed=0, tie=True)  # fmt: skip


def other_words() -> None:
    make_model("other", tokenizer=word_tokenizer("abc"), architecture="llama", hidden=16, layers=1, heads=2, mlp=32,
               context=24, seed=0)  # fmt: skip


def reward_model() -> None:
    klimb(*USUAL["REWARD"].split(), "out=rm")


def two_reward_models() -> None:
    reward_model()
    shutil.copytree("rm/model", "copy")


def rated_model() -> None:
    reward_model()
    shutil.copytree("rm/model", "rated")
    Path("rated/reward.json").write_text('{"kind": "ordinal"}')


def unfinished() -> None:
    other_run()
    Path("run/result.json").unlink()


def measured() -> None:
    klimb(*USUAL["EVALUATE"].split(), "out=measured")


def other_run() -> None:
    klimb(*USUAL["SFT"].split(), "out=run")


def other_stage() -> None:
    second = "  more: {stage: sft, model: '${sft.model}', data: demonstrations.jsonl, steps: 1, batch_size: 4}\n"
    recipe(GOOD_STAGE + second, "out: story\n")()
    klimb("run", "bad.yaml")


def two_seeds() -> None:
    klimb(*USUAL["SFT"].split(), "out=run", "seed=0..1")


def damaged(name: str) -> Prepare:
    def prepare() -> None:
        other_run()
        Path("run", name).write_text('{"cut off')

    return prepare


CASES: dict[str, list[Bad]] = {
    "Commands and keys": [
        Bad("unknown command", "grop", ("grop", "grpo")),
        Bad("a flag where a key belongs", "SFT --seed=3", ("--seed", "seed=")),
        Bad("a word without =", "SFT oops", ("oops",)),
        Bad("unknown key", "SFT optimiser.lr=1e-3", ("optimiser", "optimizer")),
        Bad("unknown key in a section", "SFT optimizer.learning_rate=1e-3", ("optimizer.learning_rate",)),
        Bad("a key at the wrong depth", "SFT lr=1e-3", ("'lr'", "optimizer.lr")),
        Bad("no number", "SFT batch_size=many", ("batch_size", "'many'")),
        Bad("out of range", "SFT batch_size=0", ("batch_size", "0")),
        Bad("a token budget that is no number", "SFT token_budget=all", ("token_budget", "'all'", "auto")),
        Bad("a required key is missing", "sft data=demonstrations.jsonl", ("model",)),
        Bad("no such choice", "SFT optimizer.decay=linaer", ("optimizer.decay", "'linear'")),
        Bad("bits that there are not", "SFT lora.base=8bit", ("lora.base", "'4bit'")),
        Bad("no such device", "SFT device=gpu", ("device=gpu",)),
        Bad("neither on nor off", "SFT checkpointing=maybe", ("checkpointing", "'maybe'", "auto")),
        Bad("doctor of an unknown job", "doctor dpoo model=base", ("'dpoo'", "'dpo'")),
        Bad("a page of an unknown algorithm", "algorithms gpro", ("'gpro'", "did you mean 'grpo'")),
        Bad("nothing to verify", "verify missing.py:MINE", ("missing.py",)),
        Bad("doctor of no model", "doctor dpo model=empty", ("model=empty", "config.json"), empty),
        Bad("no such dtype", "SFT dtype=fp8", ("dtype=fp8",)),
        Bad("no YAML after =", "SFT 'optimizer={lr'", ("optimizer",)),
    ],
    "Recipes": [
        Bad("no recipe named", "run", ("RECIPE.yaml", "quickstart")),
        Bad("unknown recipe", "run quikstart", ("quikstart", "quickstart")),
        Bad("no such file", "run missing.yaml", ("missing.yaml",)),
        Bad("not YAML", "run bad.yaml", ("bad.yaml:3",), file("bad.yaml", "name: bad\nstages: {sft: [\n")),
        Bad("a key twice", "run bad.yaml", ("bad.yaml:2", "'name'"), file("bad.yaml", "name: bad\nname: worse\n")),
        Bad("unknown key of a recipe", "run bad.yaml", ("'seeds'", "'seed'"), recipe(GOOD_STAGE, "seeds: 0..3\n")),
        Bad("unknown stage on the command line", "run bad.yaml stf.steps=3", ("'stf'", "'sft'"), recipe(GOOD_STAGE)),
        Bad("no stages", "run bad.yaml", ("stages",), file("bad.yaml", "name: bad\n")),
        Bad("a stage without its kind", "run bad.yaml", ("stages.sft", "stage:"), recipe("  sft: {model: base}\n")),
        Bad("unknown kind of stage", "run bad.yaml", ("'rll'", "'rl'"), recipe("  grpo: {stage: rll, model: base}\n")),
        Bad("unknown key of a stage", "run bad.yaml", ("stages.sft", "'step'", "'steps'"), recipe("  sft: {stage: sft, model: base, data: demonstrations.jsonl, step: 1}\n")),
        Bad("a reference to no stage", "run bad.yaml", ("stages.more", "${stf.model}", "'sft'"), recipe(GOOD_STAGE + "  more: {stage: sft, model: '${stf.model}', data: demonstrations.jsonl}\n")),
        Bad("a reference to a later stage", "run bad.yaml", ("stages.more", "'sft'"), recipe("  more: {stage: sft, model: '${sft.model}', data: demonstrations.jsonl}\n" + GOOD_STAGE)),
        Bad("a reference to what no result has", "run bad.yaml out=run", ("stages.more", "'modle'", "'model'"), recipe(GOOD_STAGE + "  more: {stage: sft, model: '${sft.modle}', data: demonstrations.jsonl}\n")),
        Bad("unknown world", "run bad.yaml", ("'clark'", "'clerk'"), recipe(GOOD_STAGE, "world: clark\n")),
        Bad("no seeds", "run bad.yaml seed=4..2", ("seed", "'4..2'"), recipe(GOOD_STAGE)),
        Bad("no seeds for a command", "SFT seed=many", ("seed", "'many'")),
    ],
    "Tasks": [
        Bad("a task that is not there", "GRPO task=tasks/missing.yaml", ("tasks/missing.yaml", "no such file")),
        Bad("a task of no such name", "GRPO task=gsm8", ("'gsm8'", "'gsm8k'")),
        Bad("an unknown key of a task", "GRPO task=bad.yaml", ("bad.yaml", "'rewrad'", "'reward'"), file("bad.yaml", "data: prompts.jsonl\nrewrad: exact\nreward: exact\n")),
        Bad("a task without a verifier", "EVALUATE task=bad.yaml", ("bad.yaml", "reward", "required"), file("bad.yaml", "eval_data: prompts.jsonl\n")),
        Bad("a task without prompts", "GRPO task=bad.yaml", ("bad.yaml", "eval_data"), file("bad.yaml", "reward: exact\n")),
        Bad("a task that holds nothing out", "GRPO task=bad.yaml", ("bad.yaml", "the same"), file("bad.yaml", "data: prompts.jsonl\neval_data: prompts.jsonl\nreward: exact\n")),
        Bad("training on what a task holds out", "GRPO task=bad.yaml", ("bad.yaml", "data=prompts.jsonl", "leave data out"), file("bad.yaml", "eval_data: prompts.jsonl\nreward: exact\n")),
        Bad("an evaluation on a task without held-out prompts", "evaluate model=base task=bad.yaml", ("bad.yaml", "measure.data"), file("bad.yaml", "data: prompts.jsonl\nreward: exact\n")),
        Bad("a task to train on that has only held-out prompts", "grpo model=base task=bad.yaml", ("bad.yaml", "no data", "give data"), file("bad.yaml", "eval_data: prompts.jsonl\nreward: exact\n")),
        Bad("an unknown reward of a task", "GRPO reward=length task=bad.yaml", ("'exakt'", "'exact'"), file("bad.yaml", "max_tokens: 4\neval_data: demonstrations.jsonl\nreward: exakt\n")),
        Bad("a reward of a task that cannot measure", "evaluate model=base task=bad.yaml threads=1 device=cpu", ("normalise: running", "leave normalise out"), file("bad.yaml", "max_tokens: 4\neval_data: prompts.jsonl\nreward: {reward: exact, normalise: running}\n")),
        Bad("a reference in a task of a stage alone", "grpo model=base task=bad.yaml", ("bad.yaml", "${world.prompts}", "alone"), file("bad.yaml", "data: ${world.prompts}\nreward: exact\n")),
        Bad("a task that only a stage will find", "run bad.yaml", ("task=${sft.task}", "path"), recipe(GOOD_STAGE + "  rl: {stage: rl, model: '${sft.model}', task: '${sft.task}'}\n")),
        Bad("a task of a stage that has no use for it", "REWARD task=gsm8k", ("'task'",)),
    ],
    "Settings that contradict each other": [
        Bad("two algorithms", "GRPO algorithm=ppo", ("grpo", "algorithm=ppo")),
        Bad("unknown algorithm", "rl model=base data=prompts.jsonl reward=exact algorithm=gpro", ("'gpro'", "'grpo'")),
        Bad("unknown axis", "GRPO algorithm.advantge=group_mean", ("'advantge'", "'advantage'")),
        Bad("unknown value of an axis", "GRPO algorithm.advantage=group_maen", ("algorithm.advantage", "'group_mean'")),
        Bad("no algorithm at all", "rl model=base data=prompts.jsonl reward=exact algorithm=3", ("algorithm", "3")),
        Bad("unknown argument", "GRPO 'algorithm.surrogate={clip: {hihg: 0.28}}'", ("algorithm.surrogate.clip", "'high'")),
        Bad("too many arguments", "GRPO 'algorithm.surrogate={clip: [0.1, 0.2, 0.3, 0.4]}'", ("algorithm.surrogate", "0.4")),
        Bad("k1 in the loss", "GRPO algorithm.kl.estimator=k1", ("kl.estimator", "k1", "k2")),
        Bad("no place for the KL", "GRPO algorithm.kl.where=both", ("kl.where", "'both'")),
        Bad("a group of one for GRPO", "GRPO samples_per_prompt=1", ("samples_per_prompt",)),
        Bad("PPO without its critic", "PPO algorithm.critic=none", ("critic",)),
        Bad("a critic for GRPO", "GRPO critic.warmup_steps=3", ("critic", "grpo")),
        Bad("a warm-up that never ends", "PPO critic.warmup_steps=3", ("critic.warmup_steps=3",)),
        Bad("refills without dynamic sampling", "GRPO max_refills=3", ("max_refills", "dynamic")),
        Bad("GDPO with one reward", "gdpo model=base data=prompts.jsonl reward=exact", ("gdpo", "list", "grpo")),
        Bad("a correction twice", "dppo model=base data=prompts.jsonl reward=exact algorithm.importance=truncate", ("importance", "surrogate to clip")),
        Bad("a sequence ratio under a token sum", "gmpo model=base data=prompts.jsonl reward=exact algorithm.aggregate=token_mean", ("geometric_clip", "sequence_mean")),
        Bad("a moving reference without a KL", "dapo model=base data=prompts.jsonl reward=exact algorithm.reference=moving", ("reference", "kl")),
        Bad("a reference that never moves", "GRPO 'algorithm.reference={moving: [0, 1]}'", ("algorithm.reference", "every")),
        Bad("a clip below zero", "GRPO 'algorithm.surrogate={clip: [-0.2, 0.2]}'", ("algorithm.surrogate.clip", "low = -0.2")),
        Bad("a leash that is tied nowhere", "GRPO 'algorithm.kl={where: none, beta: 0.5}'", ("algorithm.kl", "where to reward or loss")),
        Bad("an entropy bonus of no number", "GRPO algorithm.entropy_bonus=adaptive", ("algorithm.entropy_bonus", "'adaptive'")),
        Bad("unknown token filter", "GRPO algorithm.token_filter=top_entropi", ("algorithm.token_filter", "'top_entropy'")),
        Bad("a reference that nothing looks at", "GRPO algorithm.kl=none reference=base", ("reference", "measure_kl")),
        Bad("more updates than groups", "GRPO updates_per_step=3", ("updates_per_step=3",)),
        Bad("a share of π_ref that is none", "NASH algorithm.advantage.preferred.mixture=1.5", ("advantage.preferred", "mixture = 1.5", "at most 1")),
        Bad("an opponent under another price", "NASH 'algorithm.kl={where: reward, estimator: k1, level: token}'", ("preferred", "kl.where to loss")),
        Bad("several updates against an opponent", "NASH updates_per_step=2", ("updates_per_step to 1",)),
        Bad("a mixture of two vocabularies", "NASH reference=other", ("reference", "family"), other_words),
        Bad("several updates without a ratio", "reinforce model=base data=prompts.jsonl reward=exact updates_per_step=2", ("updates_per_step",)),
        Bad("two sources of evaluation", "SFT eval_data=demonstrations.jsonl eval_fraction=0.1", ("eval_data", "eval_fraction")),
        Bad("a reward model in 4 bits", "REWARD lora.base=4bit", ("lora.base=4bit", "merged")),
        Bad("two lengths of training", "SFT epochs=2", ("steps", "epochs")),
        Bad("evaluation of nothing", "SFT eval_every=3", ("eval_every",)),
        Bad("an accuracy of nothing", "REWARD min_accuracy=0.6", ("min_accuracy",)),
        Bad("to train until nothing is right", "REWARD until_accuracy=0.9", ("until_accuracy", "eval_data")),
        Bad("steps that nothing judges", "SAMPLE separator=x", ("separator", "reward")),
        Bad("pairs without a reward", "SAMPLE pairs=true samples_per_prompt=2", ("pairs", "reward")),
        Bad("centering of what is not compared", "REWARD kind=labels centering=0.1", ("centering", "kind=labels", "kind=bradley_terry")),
        Bad("attributes of another kind", "REWARD 'attributes={helpfulness: 1}'", ("attributes", "kind=attributes")),
        Bad("no attributes", "REWARD kind=attributes", ("kind=attributes", "helpfulness")),
        Bad("no attributes to write", "REWARD kind=attributes_text", ("kind=attributes_text", "helpfulness")),
        Bad("a rating of pairs", "REWARD rating=stars", ("rating", "kind=ordinal")),
        Bad("a reference for ratings in words", "REWARD kind=attributes_text 'attributes={helpfulness: 1}' reference=demonstrations.jsonl", ("reference", "kind=attributes_text")),
        Bad("levels of pairs", "REWARD kind=ordinal", ("preferences.jsonl", "prompt, completion")),
        Bad("a level that is not there", "REWARD kind=ordinal data=demonstrations.jsonl", ("demonstrations.jsonl", "has no column of ratings rating")),
        Bad("a level in between", "REWARD kind=ordinal data=bad.jsonl", ("bad.jsonl:1", "not a whole number"), rows({"prompt": "a ?", "completion": "yes", "rating": 2.5})),
        Bad("one level only", "REWARD kind=ordinal data=bad.jsonl", ("rating is 3 in every row",), rows(*({"prompt": "a ?", "completion": word, "rating": 3} for word in ("yes", "no")))),
        Bad("an unknown kind of reward model", "REWARD kind=proces", ("kind", "process")),
        Bad("steps of pairs", "REWARD kind=process", ("preferences.jsonl", "completions, labels")),
        Bad("a separator of pairs", "REWARD separator=x", ("separator", "kind=process")),
        Bad("a strength that is none", "REWARD data=bad.jsonl", ("bad.jsonl:1", "strength is 0.4"), rows({"prompt": "a ?", "chosen": "yes", "rejected": "no", "strength": 0.4})),
        Bad("a rating that is not there", "REWARD kind=attributes 'attributes={helpfulness: 1}' data=demonstrations.jsonl", ("demonstrations.jsonl", "has no column of ratings helpfulness")),
        Bad("dense steps in a measurement", "EVALUATE 'measure.reward={reward: rm, dense: true}'", ("dense: true", "leave dense out"), reward_model),
        Bad("dense steps within bounds", "PPO 'reward={reward: rm, dense: true, clip: 5}'", ("dense beside normalise or clip",), reward_model),
        Bad("dense steps of a rule", "PPO 'reward={reward: exact, dense: true}'", ("dense", "exact")),
        Bad("dense steps behind a gate", "PPO 'reward={gate: {when: exact, then: [{reward: rm, dense: true}], else: 0}}'", ("dense: true within a gate", "leave dense out")),
        Bad("dense steps that are added up", "GRPO 'reward={reward: rm, dense: true}'", ("grpo adds them up", "ppo")),
        Bad("baselines of nothing", "REWARD baselines=[length]", ("baselines", "eval_fraction")),
        Bad("a baseline that there is not", "REWARD eval_fraction=0.3 baselines=[lenght]", ("baselines", "length")),
        Bad("columns of what is not read", "EVALUATE columns.prompt=question", ("columns", "measure.columns")),
        Bad("best-of-n without a proxy", "EVALUATE best_of=[1,2]", ("best_of", "measure.reward")),
        Bad("more of n than samples", "EVALUATE measure.reward=rewards.py:count best_of=[64]", ("best_of", "samples_per_prompt=16")),
        Bad("too few replies to probe", "TRUST reward=rm/model probes=10", ("probes=10", "50"), reward_model),
        Bad("nothing that is a reward model", "TRUST reward=length", ("reward", "no reward model")),
        Bad("transcripts to measure a reward on", "TRUST reward=rm/model transcripts=chat", ("transcripts",), reward_model),
        Bad("a column that no pair has", "TRUST reward=rm/model by=topic", ("by", "'topic'"), reward_model),
        Bad("the average of one", "AVERAGE models=[base]", ("models", "two or more")),
        Bad("the average of a model with itself", "AVERAGE models=[base,base]", ("models", "twice")),
        Bad("the average of a reward model and another", "AVERAGE models=[rm/model,base]", ("models", "one kind"), reward_model),
        Bad("reward models averaged without pairs", "AVERAGE models=[rm/model,copy]", ("data", "data=PAIRS"), two_reward_models),
        Bad("policies averaged with pairs", "AVERAGE models=[base,tied] data=preferences.jsonl", ("data", "leave it out"), tied),
        Bad("the average of rated models", "AVERAGE models=[rated,rm/model] data=preferences.jsonl", ("model=rated", "kind=ordinal"), rated_model),
        Bad("the average of two shapes", "AVERAGE models=[base,tied]", ("model=tied", "differ in name or shape"), tied),
        Bad("unknown loss", "preference model=base data=preferences.jsonl loss=dpoo", ("loss", "'dpo'")),
        Bad("a loss with a wrong argument", "DPO loss.betta=0.1", ("loss.dpo", "'beta'")),
        Bad("a reference of a loss that has none", "PREFERENCE loss=simpo reference=base", ("reference", "loss=simpo", "measure_drift=true")),
        Bad("a drift that is logged anyway", "DPO measure_drift=true", ("measure_drift", "loss=dpo")),
        Bad("losses of different data in one", "PREFERENCE 'loss={mix: {dpo: 1, kto: 1}}'", ("loss.mix", "labels, pairs")),
        Bad("a β below zero", "PREFERENCE 'loss={dpo: -0.1}'", ("loss.dpo", "beta = -0.1", "above 0")),
        Bad("a part of a mixture without weight", "PREFERENCE 'loss={mix: {dpo: {beta: 0.1}}}'", ("loss.mix.dpo", "weight")),
        Bad("arguments of a mixture that has none", "PREFERENCE loss.name=mpo loss.beta=0.1", ("loss: mpo takes no arguments",)),
        Bad("a loss that would be infinite", "PREFERENCE loss.name=exo loss.epsilon=0", ("exo: epsilon",)),
        Bad("an algorithm out of no file", "rl model=base data=prompts.jsonl reward=exact algorithm=mine.py:MINE", ("mine.py",)),
        Bad("an algorithm that its file lacks", "rl model=base data=prompts.jsonl reward=exact algorithm=rewards.py:MINE", ("rewards.py:MINE",)),
    ],
    "Data": [
        Bad("no such file", "SFT data=missing.jsonl", ("missing.jsonl",)),
        Bad("an empty file", "SFT data=bad.jsonl", ("bad.jsonl",), file("bad.jsonl", "")),
        Bad("a directory", "SFT data=base", ("base",)),
        Bad("a format that is not read", "SFT data=bad.arrow", ("bad.arrow", "folder"), file("bad.arrow", "ARROW1")),
        Bad("a table without rows", "SFT data=bad.csv", ("bad.csv", "no rows"), file("bad.csv", "prompt,completion\n")),
        Bad("a ragged row", "SFT data=bad.csv", ("bad.csv:3", "3 cells", "2 columns"), file("bad.csv", "prompt,completion\na ?,b\nb ?,c, d\n")),
        Bad("a quote that is never closed", "SFT data=bad.csv", ("bad.csv:3", "quote"), file("bad.csv", 'prompt,completion\na ?,b\n"b ?,c\n')),
        Bad("a column's name twice", "SFT data=bad.csv", ("bad.csv:1", "'prompt'"), file("bad.csv", "prompt,prompt\na ?,b\n")),
        Bad("a column misspelt", "SFT data=bad.csv columns.prompt=qestion", ("bad.csv", "'qestion'", "'question'"), file("bad.csv", "question,completion\na ?,b\nb ?,c\n")),
        Bad("an object where a list belongs", "SFT data=bad.json", ("bad.json", "'data'"), file("bad.json", '{"version": 1, "data": [{"prompt": "a ?", "completion": "b"}]}')),
        Bad("a list that is cut off", "SFT data=bad.json", ("bad.json:2", "cut off"), file("bad.json", '[{"prompt": "a ?", "completion": "b"},\n{"prompt": "b ?", "comp')),
        Bad("a table that is cut off", "SFT data=bad.parquet", ("bad.parquet",), cut_table, foreign=True),
        Bad("a data set without training part", "SFT data=parts", ("parts", "train", "parts/test"), parts),
        Bad("an unknown speaker", "SFT data=bad.jsonl", ("bad.jsonl:1", "conversations[1]", "'gtp'", "gpt"), rows({"conversations": [{"from": "human", "value": "a ?"}, {"from": "gtp", "value": "b"}]})),
        Bad("messages that are no JSON", "SFT data=bad.csv", ("bad.csv:2", "messages"), file("bad.csv", "messages\n[{'role': 'user'}]\n")),
        Bad("no transcript", "SFT transcripts=chat", ("demonstrations.jsonl", "Human:")),
        Bad("tools that are none", "SFT data=bad.jsonl", ("bad.jsonl:1", "tools"), rows({"messages": [{"role": "user", "content": "a ?"}, {"role": "assistant", "content": "b"}], "tools": {"name": "add"}})),
        Bad("a weight that is none", "SFT 'data={demonstrations.jsonl: 0}'", ("'demonstrations.jsonl'", "above 0")),
        Bad("a file named twice", "SFT 'data=[demonstrations.jsonl, demonstrations.jsonl]'", ("twice", "2")),
        Bad("one of several is missing", "SFT 'data=[demonstrations.jsonl, missing.csv]'", ("missing.csv",)),
        Bad("wrong columns", "SFT data=bad.jsonl", ("bad.jsonl", "question"), rows({"question": "a ?", "answer": "b"})),
        Bad("data of another stage", "SFT data=prompts.jsonl", ("prompts.jsonl", "none of", "prompt-completion")),
        Bad("comparisons expected", "DPO data=demonstrations.jsonl", ("demonstrations.jsonl", "none of", "preference")),
        Bad("labels expected", "PREFERENCE loss=kto data=demonstrations.jsonl", ("demonstrations.jsonl", "labelled (prompt, completion, label)", "preference (chosen, rejected)")),
        Bad("labels of one side", "PREFERENCE loss=kto data=bad.jsonl", ("bad.jsonl", "loss=kto", "labelled true"), rows({"prompt": "a ?", "completion": "b", "label": True}, {"prompt": "b ?", "completion": "b", "label": True})),
        Bad("labels for a loss of pairs", "DPO data=bad.jsonl", ("bad.jsonl", "labelled", "preference (chosen, rejected)"), rows({"prompt": "a ?", "completion": "b", "label": True})),
        Bad("steps expected", "PREFERENCE loss=step_dpo", ("preferences.jsonl", "steps (prompt, completions, labels)")),
        Bad("steps that never disagree", "PREFERENCE loss=step_dpo data=bad.jsonl", ("bad.jsonl", "loss=dpo"), rows({"prompt": "a ?", "completions": ["b", "c"], "labels": [True, False]})),
        Bad("triples without gold", "PREFERENCE loss=tpo", ("preferences.jsonl", "a column gold")),
        Bad("a column that is not there", "SFT columns.prompt=question", ("demonstrations.jsonl", "'question'")),
        Bad("a row of another type", "SFT data=bad.jsonl", ("bad.jsonl:2", "1 of 3", "prompt"), rows({"prompt": "a ?", "completion": "b"}, {"text": "a"}, {"prompt": "b ?", "completion": "c"})),
        Bad("a question that asks nothing", "GRPO data=bad.jsonl", ("bad.jsonl:1", "system"), rows({"prompt": [{"role": "system", "content": "so"}]})),
        Bad("a line without end", "SFT data=bad.jsonl", ("bad.jsonl:1", "16 MiB"), file("bad.jsonl", b"x" * (17 << 20) + b'\n{"prompt": "a ?", "completion": "b"}\n')),
        Bad("no UTF-8 at all", "SFT data=bad.csv", ("bad.csv", "UTF-16"), file("bad.csv", "prompt,completion\na ?,b\n".encode("utf-16"))),
        Bad("names that others use", "SFT data=bad.csv", ("bad.csv", "question, answer", "{prompt: question, completion: answer}"), file("bad.csv", "question,answer\na ?,b\nb ?,c\n")),
        Bad("a malformed line", "SFT data=bad.jsonl", ("bad.jsonl:2",), file("bad.jsonl", '{"prompt": "a ?", "completion": "b"}\n{"prompt": "a ?", "completion" "b"}\n')),
        Bad("no UTF-8", "SFT data=bad.jsonl", ("bad.jsonl:2",), file("bad.jsonl", b'{"prompt": "a ?", "completion": "b"}\n{"prompt": "\xff"}\n')),
        Bad("a broken archive", "SFT data=bad.jsonl.gz", ("bad.jsonl.gz",), file("bad.jsonl.gz", gzip.compress(b'{"prompt": "a ?", "completion": "b"}\n' * 99)[:40])),
        Bad("an empty completion", "SFT data=bad.jsonl", ("bad.jsonl:2", "completion"), rows({"prompt": "a ?", "completion": "b"}, {"prompt": "b ?", "completion": ""})),
        Bad("chosen is rejected", "DPO data=bad.jsonl", ("bad.jsonl:1",), rows({"prompt": "a ?", "chosen": "b", "rejected": "b"}, {"prompt": "a ?", "chosen": "b", "rejected": "c"})),
        Bad("a word that the tokenizer does not know", "SFT data=bad.jsonl", ("bad.jsonl:2",), rows({"prompt": "a ?", "completion": "b"}, {"prompt": "zebra ?", "completion": "b"})),
        Bad("a row longer than the context", "SFT data=bad.jsonl", ("bad.jsonl:2", "24"), rows({"prompt": "a ?", "completion": "b"}, {"prompt": "b ?", "completion": "b " * 30})),
        Bad("a prompt longer than the context", "GRPO data=bad.jsonl", ("bad.jsonl:2", "20"), rows({"prompt": "a ?"}, {"prompt": "b " * 30})),
        Bad("completions longer than the context", "GRPO max_tokens=256", ("max_tokens=256", "24")),
        Bad("nothing is left to hold out", "SFT data=bad.jsonl eval_fraction=0.01", ("eval_fraction",), rows({"prompt": "a ?", "completion": "b"})),
        Bad("a column that rewards know otherwise", "GRPO data=bad.jsonl", ("'finish'",), rows({"prompt": "a ?", "finish": "line"})),
    ],
    "Models": [
        Bad("no such directory", "SFT model=./missing", ("model=./missing", "no such directory")),
        Bad("no such directory, by its slash", "SFT model=missing/", ("model=missing/", "no such directory")),
        Bad("a directory that is no model", "SFT model=empty", ("model=empty", "config.json"), empty),
        Bad("a file", "SFT model=rewards.py", ("model=rewards.py",)),
        Bad("a broken config.json", "SFT model=broken", ("model=broken",), broken_config, foreign=True),
        Bad("no weights", "SFT model=broken", ("model=broken",), no_weights, foreign=True),
        Bad("an adapter without its base", "SFT model=tuned/model", ("model=tuned/model", "./gone"), orphaned_adapter, foreign=True),
        Bad("4 bits below float64", "SFT lora.base=4bit dtype=float64", ("lora.base=4bit", "dtype=float64", "bfloat16")),
        Bad("a model that does not fit into the memory", "DPO model=broken", ("model=broken", "memory", "GB", "use"), too_wide, foreign=True),
        Bad("layers that are not there", "SFT lora.targets=[wq]", ("lora.targets", "wq"), foreign=True),
        Bad("an adapter of another rank", "SFT model=tuned/model lora.rank=8", ("lora.rank=8", "has rank 2"), tuned),
        Bad("an adapter on tied embeddings", "SFT model=tied lora.targets=[lm_head]", ("lora.targets", "all-linear"), tied),
        Bad("tokens without an embedding", "SFT model=broken", ("model=broken", "'zebra'", "resize_token_embeddings"), small_vocabulary),
        Bad("a chat template that does not end", "SFT model=broken data=bad.jsonl", ("broken", "does not end"), template(NESTS + TURNS)),
        Bad("a chat template that writes without end", "SFT model=broken data=bad.jsonl", ("broken", "does not end"), template("{{ 'a' * 10000000000 }}" + TURNS)),
        Bad("a chat template that reaches into Python", "SFT model=broken data=bad.jsonl", ("broken", "__class__"), template("{{ ''.__class__.__mro__ }}" + TURNS), foreign=True),
        Bad("a chat template that raises", "SFT model=broken data=bad.jsonl", ("broken", "not today"), template("{{ raise_exception('not today') }}" + TURNS)),
        Bad("a chat template that is none", "SFT model=broken data=bad.jsonl", ("broken", "chat template"), template("{% for %}"), foreign=True),
        Bad("a chat template that drops turns", "SFT model=broken data=bad.jsonl", ("bad.jsonl:1", "chat template"), template(TURNS.replace("messages", "messages[-1:]"))),
        Bad("a tokenizer without an end of text", "SFT model=broken", ("EOS",), without_eos),
        Bad("Python code of the model's own", "SFT model=broken", ("model=broken", "trust_remote_code=true"), own_code),
        Bad("code from a hub without a commit", "SFT model=some/model trust_remote_code=true", ("some/model", "revision=COMMIT")),
        Bad("a commit that can move", "SFT model=some/model revision=main", ("revision=main", "40 hex digits")),
        Bad("a commit of a folder", "SFT revision=0123456789abcdef0123456789abcdef01234567", ("revision", "base", "leave it out")),
        Bad("trust in what is not there", "SFT trust_remote_code=true", ("trust_remote_code", "base", "leave it out")),
        Bad("code that lies elsewhere", "SFT model=broken trust_remote_code=true", ("model=broken", "somebody/else", ".py files"), code_elsewhere),
        Bad("a critic that is no model", "PPO critic.model=empty", ("model=empty",), empty),
        Bad("a reward model that is no model", "GRPO reward=empty", ("model=empty",), empty),
    ],
    "Run directories": [
        Bad("it cannot be written", "SFT out=rewards.py/run", ("rewards.py/run",)),
        Bad("a recipe's cannot be written", "run bad.yaml out=rewards.py/run", ("rewards.py/run",), recipe(GOOD_STAGE)),
        Bad("an explicit out of another config", "SFT out=run seed=1", ("run", "seed: 0 → 1", "--fresh"), other_run),
        Bad("a recipe's stage of another config", "run bad.yaml sft.steps=2", ("story/sft", "steps: 1 → 2", "--changed", "more", "--fresh"), other_stage),
        Bad("all stages and only the changed ones", "run bad.yaml --fresh --changed", ("--fresh and --changed",), recipe(GOOD_STAGE)),
        Bad("several seeds in the directory of one", "SFT out=run seed=0..1", ("run", "one seed"), other_run),
        Bad("one seed in the directory of several", "SFT out=run", ("run", "seed-0"), two_seeds),
        Bad("several seeds of another config", "SFT out=run seed=0..1 steps=2", ("run/seed-0", "steps: 1 → 2", "--fresh"), two_seeds),
        Bad("a directory of something else", "SFT out=base", ("base", "config.json")),
        Bad("a damaged manifest", "SFT out=run", ("run/manifest.json",), damaged("manifest.json")),
        Bad("a damaged result", "SFT out=run", ("run/result.json",), damaged("result.json")),
        Bad("a report of nothing", "report missing", ("missing",)),
    ],
    "New, chat, export, schema, completion": [
        Bad("a new folder over an old one", "new base", ("base", "another name")),
        Bad("a new folder where there can be none", "new rewards.py/mine", ("rewards.py/mine",)),
        Bad("an export of nothing", "export missing", ("missing", "no such directory")),
        Bad("an export of what is no run", "export base", ("base", "is not a run")),
        Bad("an export of a run that has not finished", "export run", ("run", "continues"), unfinished),
        Bad("an export of a run without a model", "export measured", ("measured", "evaluate trains nothing"), measured),
        Bad("an export of several runs", "export story", ("story", "story/more", "story/sft"), other_stage),
        Bad("an export over something", "export run out=base", ("base", "choose another out"), other_run),
        Bad("an adapter where there is none", "export run lora=kept", ("lora=kept", "leave lora out"), other_run),
        Bad("an unknown way of an export", "export run lora=merge", ("lora", "'merged'"), other_run),
        Bad("a chat with nothing", "chat", ("klimb chat RUN",)),
        Bad("a chat with three", "chat base base base", ("not 3",)),
        Bad("a chat with no such model", "chat ./missing", ("./missing", "no such directory")),
        Bad("a chat with a reward model", "chat rm", ("rm", "is a reward model"), reward_model),
        Bad("an unknown setting of a chat", "chat base temprature=0", ("'temprature'", "'temperature'")),
        Bad("an impossible setting of a chat", "chat base top_p=2", ("top_p",)),
        Bad("a schema of nothing that is there", "schema grop", ("'grop'", "'grpo'")),
        Bad("a shell that is not known", "completion tcsh", ("'tcsh'", "bash, zsh, fish")),
    ],
    "Check": [
        Bad("a check of nothing", "check", ("klimb check DATA",)),
        Bad("a check of no such file", "check missing.jsonl", ("missing.jsonl",)),
        Bad("a check of an unknown method", "check dpoo model=base", ("'dpoo'", "'dpo'")),
        Bad("a check of an empty file", "check bad.jsonl", ("bad.jsonl", "no rows"), file("bad.jsonl", "")),
        Bad("a check with an unknown key", "check demonstrations.jsonl modle=base", ("'modle'", "'model'")),
        Bad("a check of a misspelt recipe", "check bad.yaml", ("bad.yaml", "'stpes'", "'steps'"), file("bad.yaml", "model: base\ndata: demonstrations.jsonl\nstpes: 3\n")),
        Bad("a check of a recipe for several stages", "check bad.yaml", ("reward, preference", "klimb check reward"), file("bad.yaml", "model: base\ndata: preferences.jsonl\n")),
        Bad("a dry run without its data", "SFT data=missing.jsonl --dry-run", ("missing.jsonl",)),
        Bad("a dry run where another run is", "SFT out=run steps=2 --dry-run", ("run", "steps: 1 → 2", "--fresh"), other_run),
    ],
    "Rewards": [
        Bad("no such file", "GRPO reward=missing.py:score", ("missing.py",)),
        Bad("no such function", "GRPO reward=rewards.py:cuont", ("rewards.py", "'count'")),
        Bad("a file without a function", "GRPO reward=rewards.py", ("rewards.py:NAME",)),
        Bad("unknown rule", "GRPO reward=exakt", ("'exakt'", "'exact'")),
        Bad("a file that does not run", "GRPO reward=bad.py:score", ("bad.py",), file("bad.py", "import no_such_module\n")),
        Bad("no function", "GRPO reward=bad.py:score", ("bad.py:score",), file("bad.py", "score = 3\n")),
        Bad("a column that is not there", "GRPO reward=bad.py:score", ("bad.py:score", "'solution'"), file("bad.py", "def score(completions, solution):\n    return [0.0] * len(completions)\n")),
        Bad("the wrong number of scores", "GRPO reward=bad.py:score", ("score", "1 scores for 6"), reward("return [1.0]")),
        Bad("NaN", "GRPO reward=bad.py:score", ("score", "nan"), reward("return [float('nan')] * len(completions)")),
        Bad("strings", "GRPO reward=bad.py:score", ("score", "'good'"), reward("return ['good'] * len(completions)")),
        Bad("a number for all", "GRPO reward=bad.py:score", ("score", "1.0"), reward("return 1.0")),
        Bad("None for all", "GRPO reward=bad.py:score", ("score", "None"), reward("return [None] * len(completions)")),
        Bad("it raises", "GRPO reward=bad.py:score", ("score", "ZeroDivisionError", "bad.py:3"), reward("return [1 / 0 for _ in completions]")),
        Bad("it hangs", "GRPO 'reward={bad.py:score: {timeout: 2}}'", ("score", "no answer within"), reward("time.sleep(999)")),
        Bad("it ends its process", "GRPO reward=bad.py:score", ("score", "exit code 7"), reward("os._exit(7)")),
        Bad("it fails on what the policy writes", "GRPO reward=bad.py:score", ("score", "failure_limit"), reward("return [float('nan') if c != p[0] else 1.0 for p, c in zip(prompts, completions)]")),
        Bad("unknown option", "GRPO 'reward={rewards.py:count: {patience: 3}}'", ("'patience'", "timeout")),
        Bad("an unknown option of code", "GRPO 'reward={code: {test: tests}}'", ("reward code", "'test'", "'tests'")),
        Bad("no time for code", "GRPO 'reward={code: {timeout: 0}}'", ("reward code", "timeout is 0")),
        Bad("partial credit that is no yes or no", "GRPO 'reward={code: {partial: half}}'", ("partial is 'half'", "true or false")),
        Bad("an option of another type", "GRPO 'reward={numeric: {tolerance: close}}'", ("reward numeric", "tolerance is 'close'")),
        Bad("a schema that is none", "GRPO 'reward={json_schema: {schema: {type: strin}}}'", ("reward json_schema", "'strin'", "'string'")),
        Bad("a cosine of nothing", "GRPO 'reward={cosine: {max_length: 8}}'", ("reward cosine", "'of'")),
        Bad("queries without a database", "GRPO reward=sql", ("reward sql", "'database'")),
        Bad("an instruction that nobody knows", "GRPO reward=instructions data=bad.jsonl", ("'punctuation:no_commas'", "'punctuation:no_comma'"), rows({"prompt": "a ?", "instructions": [{"check": "punctuation:no_commas"}]})),
        Bad("a page of no reward", "reward --list exakt", ("'exakt'", "'exact'")),
        Bad("an unknown key in a sum", "GRPO 'reward=[{reward: exact, wieght: 2}]'", ("'wieght'", "'weight'")),
        Bad("a reward model with options", "GRPO 'reward={base: {normalise: running}}'", ("base", "{reward: base, normalise: running")),
        Bad("an ensemble of one", "GRPO 'reward={ensemble: {models: [base]}}'", ("ensemble", "two members")),
        Bad("a member named twice", "GRPO 'reward={ensemble: {models: [base, base]}}'", ("ensemble", "twice")),
        Bad("unknown way to combine", "GRPO 'reward={ensemble: {models: [base, rm], combine: max}}'", ("'max'", "uncertainty")),
        Bad("a penalty that nothing looks at", "GRPO 'reward={ensemble: {models: [base, rm], combine: min, lambda: 0.5}}'", ("min with lambda 0.5",)),
        Bad("no penalty on uncertainty", "GRPO 'reward={ensemble: {models: [base, rm], combine: uncertainty}}'", ("lambda None",)),
        Bad("an unknown option of an ensemble", "GRPO 'reward={ensemble: {members: [base, rm]}}'", ("'members'",)),
        Bad("an unknown scale", "GRPO 'reward={reward: exact, normalise: batch}'", ("'batch'", "running")),
        Bad("no bound", "GRPO 'reward={reward: exact, clip: 0}'", ("clip is 0",)),
        Bad("a measure that moves", "EVALUATE 'measure.reward={reward: rewards.py:count, normalise: running}'", ("normalise: running", "leave normalise out")),
        Bad("a gate that does not say what is left outside", "GRPO 'reward={gate: {when: exact, then: length}}'", ("reward gate", "'else'")),
        Bad("a product that is no list", "GRPO 'reward={product: exact}'", ("reward product", "'exact'", "list")),
        Bad("a weight in a product", "GRPO 'reward={product: [{reward: exact, weight: 2}]}'", ("'weight'", "product")),
        Bad("a route by a column that is not there", "GRPO 'reward={route: {column: source, to: {math: exact}}}'", ("reward route", "'source'", "answer")),
        Bad("a route that knows no row", "GRPO 'reward={route: {column: answer, to: {math: exact}}}'", ("route", "answer 'a' has no reward", "known: math")),
        Bad("a server that is not there", "GRPO 'reward={http: {url: \"http://127.0.0.1:9/score\"}}'", ("reward http", "127.0.0.1:9", "is it running"), foreign=True),
        Bad("a password in a url", "GRPO 'reward={http: {url: \"http://me:secret@host/\"}}'", ("reward http", "key")),
        Bad("a key that is not there", "GRPO 'reward={http: {url: \"http://host/\", key_env: NO_SUCH_KEY}}'", ("NO_SUCH_KEY", "export")),
        Bad("a key itself instead of its name", "GRPO 'reward={http: {url: \"http://host/\", key_env: sk-1}}'", ("key", "environment variable")),
        Bad("code for a service without a url", "GRPO 'reward={code: {service: sandbox}}'", ("reward code", "no url")),
        Bad("no group to learn from", "dapo model=base data=prompts.jsonl reward=bad.py:score max_tokens=4 prompts_per_step=2 max_refills=1", ("step 1",), reward("return [1.0] * len(completions)")),
    ],
    "Judges": [
        Bad("unknown option of a judge", "GRPO 'reward={judge: {modle: m}}'", ("reward judge", "'modle'", "'model'")),
        Bad("a judge without a model", "GRPO 'reward={judge: {url: \"https://host/v1\"}}'", ("reward judge", "model")),
        Bad("a server that is none", "GRPO 'reward={judge: {model: m, url: host/v1}}'", ("reward judge", "url", "https://")),
        Bad("a key where its variable belongs", "GRPO 'reward={judge: {model: m, url: \"https://host/v1\", key_env: sk-123}}'", ("key_env", "OPENAI_API_KEY")),
        Bad("a key in a url", "GRPO 'reward={judge: {model: m, url: \"https://me:secret@host/v1\"}}'", ("url", "key_env")),
        Bad("a variable that is not set", "LABEL judge.url=https://host/v1 judge.key_env=NO_SUCH_KEY", ("NO_SUCH_KEY", "export"), ANSWERS),
        Bad("a scale the wrong way round", "GRPO 'reward={judge: {model: base, scale: [10, 1]}}'", ("scale=[10, 1]",)),
        Bad("a judge that compares and checks", "GRPO 'reward={judge: {model: base, reference: answer, against: answer}}'", ("against", "reference")),
        Bad("money without prices", "GRPO 'reward={judge: {model: m, url: \"https://host/v1\", budget: {money: 3}}}'", ("budget.money", "prices")),
        Bad("a budget for a model on this machine", "GRPO 'reward={judge: {model: base, budget: {requests: 3}}}'", ("budget", "url")),
        Bad("a column for a judge that is not there", "GRPO 'reward={judge: {model: base, reference: anwser, canary_limit: 1}}'", ("'anwser'", "'answer'")),
        Bad("nobody at home", "LABEL judge.url=http://127.0.0.1:9/v1 judge.timeout=1 judge.canary_limit=1", ("1 of 1 pairs failed", "refused"), ANSWERS),
        Bad("nothing to compare", "LABEL data=bad.jsonl judge.url=http://127.0.0.1:9/v1", ("bad.jsonl", "two different"), rows({"prompt": "a ?", "completion": "b"})),
        Bad("rows without completions", "LABEL data=prompts.jsonl judge.url=http://127.0.0.1:9/v1", ("prompts.jsonl", "completion")),
        Bad("two ideas of what is better", "LABEL judge.rubric=kind principles=default", ("principles", "judge.rubric")),
        Bad("no such principles", "LABEL principles=missing.yaml", ("missing.yaml",), ANSWERS),
        Bad("a principle that lacks a part", "revise model=base data=prompts.jsonl principles=bad.yaml", ("bad.yaml", "principle 1", "'compare'"), file("bad.yaml", "- {name: a, criticise: b, revise: c}\n")),
        Bad("a model that finishes nothing", "revise model=base data=prompts.jsonl max_tokens=1 threads=1 device=cpu", ("model=base", "no revision")),
    ],
}  # fmt: skip
"""By chapter of docs/ERRORS.md."""


def furnish(folder: Path, world: World) -> None:
    """The files that every command finds, by the names that it uses."""
    (folder / "base").symlink_to(world.model)
    for name in (world.demonstrations, world.prompts, world.preferences, world.rewards):
        shutil.copy(name, folder)
    write(folder / "demonstrations.jsonl", [{"prompt": "a ?", "completion": "b"}, {"prompt": "b ?", "completion": "c"}])


def messages() -> Iterator[tuple[str, Bad, str]]:
    """(chapter, mistake, what klimb says to it), each in a folder of its own."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as temporary:
        world = make_world(Path(temporary))
        for chapter, cases in CASES.items():
            for bad in cases:
                folder = Path(tempfile.mkdtemp(dir=temporary))
                furnish(folder, world)
                os.chdir(folder)
                bad.prepare()
                yield chapter, bad, bad.say().err
        os.chdir(before)


def document() -> str:
    lines = [
        "# What klimb says when something is wrong",
        "",
        "Each mistake gives one line on standard error (what, where, why, and the fix) and an exit code other than 0; what",
        "was there before is still there. Written by `python tests/stages/bad_inputs.py`, and held against it by a test.",
    ]
    chapters: set[str] = set()
    for chapter, bad, said in messages():
        if chapter not in chapters:
            lines += ["", f"## {chapter}", "", "| | klimb: |", "|---|---|"]
            chapters.add(chapter)
        lines.append(line(bad, said))
    return "\n".join(lines) + "\n"


def line(bad: Bad, said: str) -> str:
    """The mistake and its message as a line of a table."""
    text = said.strip().removeprefix("klimb: ").replace("|", "\\|").replace("`", "´")
    return f"| {bad.situation} | `{text}` |"


if __name__ == "__main__":
    text = document()
    (Path(__file__).parents[2] / "docs" / "ERRORS.md").write_text(text)
    sys.stdout.write(text)
