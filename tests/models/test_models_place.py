"""What a model says of itself before its weights are read, in a directory or under a hub name."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from families import CONFIGS, ragged, tiny

from klimb.batch import TokenBatch
from klimb.errors import KlimbError
from klimb.models import attention
from klimb.models.backbone import Backbone
from klimb.models.encoder import EncoderReward
from klimb.models.faces import Critic, Policy, RewardModel
from klimb.models.place import context_length, is_classifier

COMMIT = "c" * 40


def test_a_reward_model_is_known_by_its_hub_name(tmp_path: Path) -> None:
    """Of a cache as the hub's client keeps it; a causal model beside it is none."""
    hub = tmp_path / "hub"
    config = CONFIGS["llama"]()
    for name, kind in {"rm": "LlamaForSequenceClassification", "lm": "LlamaForCausalLM"}.items():
        config.architectures = [kind]
        config.save_pretrained(hub / f"models--org--{name}" / "snapshots" / COMMIT)
        (hub / f"models--org--{name}" / "refs").mkdir()
        (hub / f"models--org--{name}" / "refs" / "main").write_text(COMMIT)
    asked = "from klimb.models.place import is_classifier as asked; print(asked('org/rm'), asked('org/lm'))"
    environment = {**os.environ, "HF_HUB_CACHE": str(hub), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, env=environment, check=False)
    assert done.stdout == "True False\n", done.stderr[-2000:]


def test_an_adapter_is_no_classifier(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "org/rm"}')
    assert not is_classifier(str(tmp_path))


@pytest.mark.parametrize(
    ("config", "tokens"),
    [
        (transformers.BertConfig(max_position_embeddings=512), 512),
        (transformers.RobertaConfig(max_position_embeddings=514, pad_token_id=1), 512),
        (transformers.XLMRobertaConfig(max_position_embeddings=514, pad_token_id=1), 512),
        (transformers.MPNetConfig(max_position_embeddings=514, pad_token_id=1), 512),
        (transformers.GPT2Config(n_positions=64), 64),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_the_context_is_what_a_model_can_be_given(config: transformers.PretrainedConfig, tokens: int) -> None:
    assert context_length(config) == tokens


@pytest.mark.parametrize("face", ["policy", "critic", "reward"])
def test_a_row_beyond_the_positions_is_refused_with_what_to_lower(face: str) -> None:
    model = tiny("llama")
    batch = ragged(longest=20)
    longest = max(len(row) for rows in batch.rows for row in rows)
    if face == "reward":
        config = CONFIGS["llama"]()
        config.num_labels = 1
        model = transformers.AutoModelForSequenceClassification.from_config(config, attn_implementation=attention.NAME)
    backbone = Backbone(model.eval())
    asked = {"policy": lambda: Policy(backbone, None), "critic": lambda: Critic(backbone, None),
             "reward": lambda: RewardModel(backbone)}[face]()  # fmt: skip
    backbone.context = longest
    asked(batch)
    backbone.context = longest - 1
    with pytest.raises(KlimbError, match=f"a row has {longest} tokens.*takes {longest - 1}.*max_prompt_tokens"):
        asked(batch)


def test_a_text_beyond_an_encoders_positions_is_refused() -> None:
    config = transformers.BertConfig(
        vocab_size=97, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=16, num_labels=1,
    )  # fmt: skip
    judge = EncoderReward(Backbone(transformers.BertForSequenceClassification(config).eval()))
    batch: TokenBatch = ragged(longest=20)
    longest = max(len(row) for rows in batch.rows for row in rows)
    with torch.no_grad(), pytest.raises(KlimbError, match=f"a text has {longest} tokens.*takes 16"):
        judge(batch)
