"""Reward models on encoders, which see a text from both sides (BERT), also with a decoder behind them (T5, BART).

klimb's packed attention is causal, so these are called as transformers calls them: rows padded to each other, with a
mask. That is the one padded path in klimb; nothing but a score at the end of a whole text is read from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from klimb.batch import TokenBatch
from klimb.errors import KlimbError
from klimb.models import code
from klimb.models.backbone import Backbone
from klimb.models.logprobs import precision


def is_encoder(model: str) -> bool:
    """Alone or with a decoder. Raises KlimbError where that gives no score; what cannot be read the loader tells."""
    try:
        config = AutoConfig.from_pretrained(model, **code.loading(model))
    except (OSError, ValueError, KeyError):
        return False
    if getattr(config, "is_encoder_decoder", False):
        if config.model_type in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES:
            return True
        raise KlimbError(f"model={model}: transformers has no sequence classifier for {config.model_type}",
                         fix="use a decoder (Llama, Qwen, …), an encoder (BERT, …) or both (T5, BART)")  # fmt: skip
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
        texts = [[*row.prompt, *row.completion] for [row] in batch.rows]
        config = self.backbone.model.config
        if not config.is_encoder_decoder:
            return self._called(texts)
        # It is read at the last end token, and called on texts that have equally many.
        end, room = config.eos_token_id, self.backbone.context
        texts = [text if text[-1] == end else [*text[: room - 1], end] for text in texts]
        found: dict[int, Tensor] = {}
        for count in sorted({text.count(end) for text in texts}):
            places = [i for i, text in enumerate(texts) if text.count(end) == count]
            found |= zip(places, self._called([texts[i] for i in places]), strict=True)
        return torch.stack([found[i] for i in range(len(texts))])

    def _called(self, texts: Sequence[Sequence[int]]) -> Tensor:
        config = self.backbone.model.config
        relative = hasattr(config, "relative_attention_num_buckets")  # T5's positions have no end
        if (longest := max(map(len, texts), default=0)) > self.backbone.context and not relative:
            raise KlimbError(f"a text has {longest} tokens", where=str(config.name_or_path),
                             why=f"this model takes {self.backbone.context}",
                             fix="lower max_prompt_tokens or max_tokens, or take a model with more")  # fmt: skip
        rows = [torch.tensor(text) for text in texts]
        tokens = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self._pad)
        seen = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        device = self.backbone.device
        logits: Tensor = self.backbone.model(input_ids=tokens.to(device), attention_mask=seen.to(device)).logits
        return logits.to(precision(logits))

    @property
    def _pad(self) -> int:
        return int(self.backbone.model.config.pad_token_id or 0)

    def trainable(self) -> dict[str, nn.Parameter]:
        return self.backbone.trainable()
