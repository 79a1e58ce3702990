"""Two policies as one to draw from: their geometric mixture, token by token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from klimb.errors import ConfigError
from klimb.models.attention import AttentionPlan
from klimb.models.faces import Policy
from klimb.models.linears import Ready
from klimb.models.logprobs import Head


class Mixture:
    """π(token)^(1 − share) · π_ref(token)^share, normalised at each token, for an engine to draw from.

    That of whole completions, which the product of tokens is not, would need a normaliser nobody can compute (Munos et
    al. 2023, arXiv 2312.00886, section 7.1). Logits are mixed, since their normalisers cancel; at a temperature it is
    the mixture of both at that temperature. Computes both models at each token, and keeps keys and values of both.
    Raises ConfigError: the models have other vocabularies.
    """

    def __init__(self, policy: Policy, reference: Policy, share: float) -> None:
        self.policy, self.reference, self.share = policy, reference, share
        own, other = (face.backbone.model.config.get_text_config().vocab_size for face in (policy, reference))
        if own != other:
            raise ConfigError(
                f"reference: it gives logits of {other} tokens and the policy of {own}",
                why="the algorithm draws from a mixture of both, token by token",
                fix="use a reference of the policy's own family, or leave reference out",
            )

    @property
    def device(self) -> torch.device:
        return self.policy.device

    @property
    def context(self) -> int:
        return min(self.policy.context, self.reference.context)

    def states(
        self, tokens: Tensor, positions: Tensor, plan: AttentionPlan, keep: Tensor, read: Tensor | None
    ) -> Tensor:
        """Mixed logits [K, V] at the flat places `keep` [K]."""
        own = self.policy.head().logits(self.policy.states(tokens, positions, plan, keep, read))
        beside = _Beside(plan)
        other = self.reference.head().logits(self.reference.states(tokens, positions, beside, keep, read))
        return torch.lerp(own, other, self.share)

    def for_decoding(self) -> Ready:
        """The weights of both, for the time in which they do not change."""
        faces = {id(face.backbone): face for face in (self.policy, self.reference)}  # adapters may share one
        return Ready({layer: p for face in faces.values() for layer, p in face.for_decoding().panels.items()}, {})

    def head(self) -> Head:
        return Head(None)


@dataclass
class _Beside:
    """The same plan for a second model: its layers have places of their own in the cache."""

    plan: AttentionPlan
    read: Tensor | None = None

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, softcap: float | None
    ) -> Tensor:
        return self.plan.attend(-1 - layer, q, k, v, scale, window, softcap)
