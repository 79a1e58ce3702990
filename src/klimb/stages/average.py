"""One model out of several: the mean of their weights (WARM for reward models, model soups for policies).

::

    klimb average models=[runs/rm-1/model, runs/rm-2/model, runs/rm-3/model] data=held_out.jsonl
    klimb average models=[runs/a/model, runs/b/model]

It costs one model to ask where an ensemble costs all of its members. It works where the members began from the same
pretrained weights, because then the straight line between them stays good (Ramé et al. 2024, arXiv 2401.12187); that
cannot be seen from the weights, so on `data` the mean is measured beside each of its members, and what comes is said.
The weights are averaged as they are, the head of raw scores among them; then the scores of the mean are centred and
scaled anew on the replies of `data`, as after training.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from klimb.data.load import load_preferences
from klimb.data.render import Renderer
from klimb.errors import ConfigError, KlimbError
from klimb.models.backbone import Backbone
from klimb.models.faces import RewardModel, reward_scores
from klimb.models.load import load_causal, load_classifier, reward_facts, save_causal, save_classifier
from klimb.models.place import context_length, is_classifier, load_tokenizer
from klimb.runtime.plan import Learning, Work
from klimb.runtime.ranks import rank
from klimb.runtime.run import Run
from klimb.runtime.signals import Interrupt
from klimb.stages.baselines import accuracy_of
from klimb.stages.common import RunConfig, Session
from klimb.stages.given import Data
from klimb.stages.memory import of_judging
from klimb.stages.models import model_folder
from klimb.stages.reward_kinds.comparisons import batch_of


class AverageConfig(RunConfig):
    """`model` is the first of the models, and need not be said; its tokenizer and settings are the mean's."""

    model: str = Field("", description="default: the first of models")
    models: list[str] = Field(description="directories of models of one shape")
    data: Data = Field(None, description="of reward models: pairs to scale the mean's scores on, and to compare on")

    @model_validator(mode="before")
    @classmethod
    def _first_model(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and "model" not in values and isinstance(values.get("models"), list):
            return {**values, "model": next(iter(values["models"]), "")}
        return values

    def work(self, context: int) -> Work:
        kind = is_classifier(self.model)
        one = Learning(self.model, classifier=kind)
        return Work(one, of_judging(self, context).shape, trains=False, frozen=(("sum of the weights", one),))

    def contradictions(self) -> Iterator[str]:
        yield from super().contradictions()
        if len(self.models) < 2:
            yield "models: the mean of one is itself; give two or more"
            return
        if self.model != self.models[0]:
            yield "model: it is the first of models; leave it out"
        if len(set(self.models)) < len(self.models):
            yield "models: one is named twice; name each once"


def train(config: AverageConfig, run: Run, interrupt: Interrupt, say: Any) -> dict[str, Any]:
    """Named as in the other stages: it is what the stage does. Nothing is trained."""
    session = Session.begin(config, run, interrupt, say)
    kinds = {model: is_classifier(model) for model in config.models}
    if len(set(kinds.values())) > 1:
        raise ConfigError("reward models and others cannot be averaged", where="models", fix="give models of one kind")
    if kinds[config.model] and config.data is None:
        raise ConfigError("data is missing", where="average", why="the mean's scores are scaled on replies of pairs",
                          fix="give data=PAIRS")  # fmt: skip
    if not kinds[config.model] and config.data is not None:
        raise ConfigError("data would not be looked at", where="average", why="these are no reward models",
                          fix="leave it out")  # fmt: skip
    for model in config.models if kinds[config.model] else []:
        check_scalar(model)
    tokenizer = load_tokenizer(config.model)
    network, others = load(session, config.model), config.models[1:]
    total = {name: value.double() for name, value in network.state_dict().items()}
    for model in others:
        check_tokenizer(tokenizer, load_tokenizer(model), config.model, model)
        add(total, load(session, model), config.model, model)
    network.load_state_dict({name: value / len(config.models) for name, value in total.items()})
    if config.data is None:
        if rank() == 0:
            with model_folder(run.model) as folder:
                save_causal(network, tokenizer, folder, [])
        return {"model": str(run.model), "averaged": len(config.models), "evaluation": None}
    return {"model": str(run.model), "averaged": len(config.models), "evaluation": None,
            **_as_reward_model(config, session, network, tokenizer)}  # fmt: skip


def load(session: Session, model: str) -> PreTrainedModel:
    if is_classifier(model):
        return load_classifier(model, session.device, session.dtype)
    return Backbone(*load_causal(model, session.device, session.dtype)).model  # with a LoRA adapter merged into it


def add(total: dict[str, Tensor], network: PreTrainedModel, first: str, model: str) -> None:
    """Raises KlimbError where the weights are not of the same names and shapes."""
    weights = network.state_dict()
    other = [name for name in {**total, **weights}
             if name not in weights or name not in total or total[name].shape != weights[name].shape]  # fmt: skip
    if other:
        raise KlimbError(f"{len(other)} weights differ in name or shape from those of {first}", where=f"model={model}",
                         why=f"the first is {other[0]}", fix="average models that began from the same one")  # fmt: skip
    for name, value in weights.items():
        total[name] += value.double()


def check_scalar(model: str) -> None:
    if (kind := reward_facts(model).get("kind")) is not None:
        raise ConfigError(f"a reward model of kind={kind}: the mean of several is not told from pairs alone",
                          where=f"model={model}", why="how its head is read would have to be found anew, too",
                          fix="average scalar reward models, or ask several as an ensemble")  # fmt: skip


def check_tokenizer(
    first: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase, model: str, other_model: str
) -> None:
    if first.get_vocab() != other.get_vocab() or first.chat_template != other.chat_template:
        raise KlimbError(f"its tokenizer or chat template is not that of {model}", where=f"model={other_model}",
                         fix="average models that read texts alike")  # fmt: skip


def _as_reward_model(
    config: AverageConfig, session: Session, network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """Saves it with the mean and std of its scores on `data`; its accuracy there, and its members'."""
    renderer = Renderer(tokenizer)
    data = session.read(load_preferences, config.data, config, renderer, context_length(network.config))
    pairs = session.at_the_end(data.items)
    if data.conversational:
        tokenizer.chat_template = renderer.template.source
    batch = batch_of(pairs)

    @torch.no_grad()
    def raw(classifier: PreTrainedModel) -> Tensor:
        return reward_scores(RewardModel(Backbone(classifier)), batch, budget=session.scoring)

    scores = {"the mean": raw(network)} | {model: raw(load(session, model)) for model in config.models}
    found = {name: accuracy_of(each[0::2] - each[1::2]) for name, each in scores.items()}
    for name, of in found.items():
        session.say(f"  {name}: {of['accuracy']:.3f} [{of['accuracy_low']:.3f}, {of['accuracy_high']:.3f}]")
    std = float(scores["the mean"].std())
    if not std > 0:
        raise KlimbError("the mean gives all replies the same score", where="models", why="they have nothing in "
                         "common", fix="average models that began from the same one")  # fmt: skip
    normalisation = {"mean": float(scores["the mean"].mean()), "std": std}
    if rank() == 0:
        with model_folder(session.run.model) as folder:
            save_classifier(network, tokenizer, folder, normalisation)
    members = [found[model] for model in config.models]
    return {**found["the mean"], "held_out_pairs": len(pairs), "members": members, **normalisation}
