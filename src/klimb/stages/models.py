"""Which weights a stage runs on: the policy, what it is compared with, and the critic that judges it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from klimb.data.render import Renderer
from klimb.data.template import RenderError
from klimb.errors import ConfigError
from klimb.models import nf4
from klimb.models.backbone import Backbone
from klimb.models.encoder import EncoderReward, is_encoder, load_encoder
from klimb.models.faces import Critic, Policy, RewardModel, Verdicts
from klimb.models.load import (
    LoRA,
    check_vocabulary,
    load_causal,
    load_classifier,
    reward_facts,
    save_adapter,
    save_causal,
    score_head,
)
from klimb.models.place import declared_context, is_classifier, load_tokenizer
from klimb.models.probe import probed_policy
from klimb.models.rated import Judge, Ordinal, WrittenRatings
from klimb.runtime import durable
from klimb.runtime.ranks import rank
from klimb.stages.common import Session
from klimb.types import Prompt


@dataclass
class Loaded:
    """A policy, how its texts become tokens, and where it came from."""

    policy: Policy
    renderer: Renderer
    source: str
    conversational: bool = False
    """Trained on messages: then the template that rendered them is part of the model."""
    base_in_4bit: bool = False
    """The adapter belongs to the base as 4 bits hold it, which whoever loads it has to know."""

    @property
    def backbone(self) -> Backbone:
        return self.policy.backbone

    def stop_tokens(self, prompts: Sequence[Prompt]) -> frozenset[int]:
        """Where generation ends: the tokens that training on texts of this form teaches as the last."""
        return self.renderer.stop_tokens(
            any(isinstance(prompt.text, list) for prompt in prompts[:1])
        )  # all are of one form

    def all_stop_tokens(self) -> list[int]:
        """For the generation config: of strings, and of conversations where there is a template."""
        ends = self.renderer.stop_tokens(False)
        if self.conversational or self.renderer.tokenizer.chat_template:
            with suppress(*(() if self.conversational else (RenderError,))):  # a template that nothing was trained with
                ends |= self.renderer.stop_tokens(True)
        return sorted(ends)

    def save(self, directory: Path) -> None:
        """Hugging Face layout: the model, or its adapter alone when there is one. Rank 0 writes it."""
        if rank() != 0:
            return
        backbone = self.backbone
        if self.conversational:
            self.renderer.tokenizer.chat_template = self.renderer.template.source
        tokenizer, ends = self.renderer.tokenizer, self.all_stop_tokens()
        with model_folder(directory) as folder:
            if backbone.peft is None:
                save_causal(backbone.model, tokenizer, folder, ends)
            else:
                save_adapter(backbone.model, backbone.peft, tokenizer, folder, ends)
                if self.base_in_4bit:
                    nf4.note(folder)


@contextmanager
def model_folder(directory: Path) -> Iterator[Path]:
    """A folder to save a model in: as `directory` it appears whole or not at all, in the place of an older one."""
    with durable.explained("cannot save the model", directory, fix="make room and run the same command again"):
        durable.remove_folder(directory)
        with durable.new_folder(directory) as folder:
            yield folder


def load_texts(model: str) -> tuple[Renderer, int]:
    """How texts become the model's tokens, and how many it takes: known before its weights are read."""
    return Renderer(load_tokenizer(model)), declared_context(model)


def prompt_room(context: int, max_tokens: int) -> int:
    """The longest prompt that leaves room for `max_tokens`."""
    if context <= max_tokens:
        raise ConfigError(
            f"max_tokens={max_tokens} leaves no room for a prompt", why=f"the model's context is {context} tokens",
            fix="lower max_tokens",
        )  # fmt: skip
    return context - max_tokens


def load_policy(session: Session, model: str, lora: LoRA | None, seed: int, renderer: Renderer | None = None) -> Loaded:
    """The policy that training starts from, its numbers held against the model's own."""
    renderer = renderer or Renderer(load_tokenizer(model))
    network, adapter = load_causal(model, session.device, session.dtype, lora.base if lora else "dense")
    check_vocabulary(network, renderer.tokenizer, model)
    torch.manual_seed(seed)  # a new adapter draws its first matrices
    backbone = _trained(session, Backbone(network, adapter, lora))
    policy, path = probed_policy(backbone, "policy" if backbone.peft is not None else None)
    session.say(f"{model}: {path}")
    base_in_4bit = lora is not None and (lora.base == "4bit" or nf4.noted(model))
    return Loaded(policy, renderer, model, base_in_4bit=base_in_4bit)


def load_reference(session: Session, policy: Loaded, reference: str | None = None, moves: bool = False) -> Policy:
    """π_ref, frozen: the named model, else the policy as it is now, before its first update.

    moves: its weights are going to follow the policy's, so that on LoRA it is an adapter of its own.

    Raises ConfigError where the named one has other tokens: log-probs of the two would be of different texts.

    On LoRA nothing is loaded twice: the reference is the base with the adapter off, or a frozen copy of the adapter
    that training started from, which is another thing than the base.
    """
    backbone, named = policy.backbone, reference or policy.source
    if named != policy.source:
        check_same_tokens(policy.renderer.tokenizer, load_tokenizer(named), f"reference={named}")
    if named == policy.source and backbone.peft is not None and not backbone.started_from_adapter and not moves:
        return Policy(backbone, None, policy.policy.own_head)
    if reference is None and backbone.peft is not None:
        backbone.add_adapter("reference", "policy")
        return Policy(backbone, "reference", policy.policy.own_head)
    network, adapter = load_causal(named, session.device, session.dtype)
    if named == policy.source and policy.base_in_4bit and not nf4.noted(named):
        nf4.round_weights(network)  # an adapter of a dense base that went on in 4 bits
    frozen = Backbone(network, adapter)
    frozen.requires_grad_(False)
    return Policy(frozen, None, policy.policy.own_head)


def check_same_tokens(ours: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase, place: str) -> None:
    """Raises ConfigError where an id means different tokens: distributions over them could not be compared."""
    mine, other = ours.get_vocab(), theirs.get_vocab()
    clashes = [token for token in {*mine} & {*other} if mine[token] != other[token]]
    names = {place: token for token, place in other.items()}
    clashes += [token for token, place in mine.items() if token not in other and place in names]
    if not clashes:  # what one of them has besides is not in the other's texts
        return
    token = min(clashes)
    here, there = mine[token], other.get(token, "none")
    raise ConfigError(
        "its vocabulary is another than the trained model's", where=place,
        why=f"token {token!r} has the id {here} in the trained model and {there} there",
        fix="take one of the same family; a teacher of another can write texts (klimb sample) to learn (klimb sft)",
    )  # fmt: skip


def load_critic(session: Session, policy: Loaded, model: str | None) -> Critic:
    """The critic starts from a reward model's weights and head, or as a copy of the policy with a head of zeros."""
    if model is not None and is_classifier(model):
        classifier, facts = load_classifier(model, session.device, session.dtype), reward_facts(model)
        scale = {name: float(facts[name]) for name in ("mean", "std") if name in facts}
        return Critic(_trained(session, Backbone(classifier)), None, score_head(classifier), **scale)
    backbone = policy.backbone
    if model is None and backbone.peft is not None:
        backbone.add_adapter("critic", "policy")
        return Critic(backbone, "critic")
    network, adapter = load_causal(model or policy.source, session.device, session.dtype)
    return Critic(_trained(session, Backbone(network, adapter)), None)


def load_reward_model(
    session: Session, model: str, lora: LoRA | None = None, seed: int = 0, facts: Mapping[str, Any] | None = None
) -> Judge:
    """facts: how it is read; by default what is noted in its directory."""
    facts = reward_facts(model) if facts is None else facts
    if facts.get("kind") == "generative":
        loaded = load_policy(session, model, lora, seed)
        return Verdicts(loaded.policy, facts["yes"], facts["no"])
    if facts.get("kind") == "attributes_text":
        return WrittenRatings.of(load_policy(session, model, lora, seed).policy, facts)
    ratings: Mapping[str, float] | None = facts.get("attributes")
    weights = [*ratings.values()] if ratings else None
    encoder = is_encoder(model)
    load = load_encoder if encoder else load_classifier
    classifier = load(model, session.device, session.dtype, seed, len(weights or (1,)))
    if ratings:
        classifier.config.id2label = dict(enumerate(ratings))
        classifier.config.label2id = {name: place for place, name in enumerate(ratings)}
        classifier.config.problem_type = "regression"
    if encoder:
        _check_encoder(model, lora, facts)
        found: RewardModel | EncoderReward = EncoderReward(_trained(session, Backbone(classifier)), weights=weights)
    else:
        backbone = _trained(session, Backbone(classifier, None, lora))
        found = RewardModel(backbone, weights=weights, combine=facts.get("combine"))
    return Ordinal(found, facts["levels"], facts["thresholds"]) if facts.get("kind") == "ordinal" else found


def _check_encoder(model: str, lora: LoRA | None, facts: Mapping[str, Any]) -> None:
    if lora is not None:
        raise ConfigError("lora: an encoder is trained whole", where=f"model={model}", fix="leave lora out")
    if facts.get("kind") == "process":
        raise ConfigError("kind=process: an encoder sees a step's end from behind, too", where=f"model={model}",
                          fix="use a decoder, or kind=labels")  # fmt: skip


def _trained(session: Session, backbone: Backbone) -> Backbone:
    if session.checkpointing:
        backbone.checkpoint_activations()
    return backbone
