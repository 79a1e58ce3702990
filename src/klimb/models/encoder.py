"""Reward models on encoders (BERT and its relatives), which see a text from both sides.

klimb's packed attention is causal, so these are called as transformers calls them: rows padded to each other, with a
mask. That is the one padded path in klimb; nothing but a score at the end of a whole text is read from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from klimb.batch import TokenBatch
from klimb.errors import KlimbError
from klimb.models import code
from klimb.models.backbone import Backbone
from klimb.models.logprobs import precision


def is_encoder(model: str) -> bool:
    """Raises KlimbError of an encoder with a decoder. What cannot be read is for the loader to say."""
    try:
        config = AutoConfig.from_pretrained(model, **code.loading(model))
    except (OSError, ValueError, KeyError):
        return False
    if getattr(config, "is_encoder_decoder", False):
        raise KlimbError(f"model={model}: a reward model on an encoder with a decoder is not supported",
                         fix="use a decoder (Llama, Qwen, …) or an encoder (BERT, RoBERTa, ModernBERT, …)")  # fmt: skip
    return config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)


def load_encoder(model: str, device: torch.device, dtype: torch.dtype, seed: int, outputs: int) -> PreTrainedModel:
    """A sequence classifier as transformers makes it; what its head lacks is drawn from `seed`."""
    torch.manual_seed(seed)
    network: Any = AutoModelForSequenceClassification.from_pretrained(
        model, dtype=dtype, num_labels=outputs, **code.loading(model)
    )
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return network.to(device).eval()


class EncoderReward(nn.Module):
    """r over a sequence classifier that takes padded rows. weights [K]: as those of `RewardModel`."""

    combine = None

    def __init__(self, backbone: Backbone, *, weights: Sequence[float] | None = None) -> None:
        super().__init__()
        self.backbone, self.weights = backbone, weights

    def forward(self, batch: TokenBatch) -> Tensor:
        """Raw scores [B]."""
        outputs = self.outputs(batch)
        return outputs.squeeze(-1) if self.weights is None else outputs @ outputs.new_tensor(self.weights)

    def outputs(self, batch: TokenBatch) -> Tensor:
        """What the head says of each sample's only row: [B, K]."""
        texts = [torch.tensor([*row.prompt, *row.completion]) for [row] in batch.rows]
        tokens = nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=self._pad)
        seen = nn.utils.rnn.pad_sequence([torch.ones_like(text) for text in texts], batch_first=True)
        device = self.backbone.device
        logits: Tensor = self.backbone.model(input_ids=tokens.to(device), attention_mask=seen.to(device)).logits
        return logits.to(precision(logits))

    @property
    def _pad(self) -> int:
        return int(self.backbone.model.config.pad_token_id or 0)

    def trainable(self) -> dict[str, nn.Parameter]:
        return self.backbone.trainable()
