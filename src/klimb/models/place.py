"""What a model directory (or hub name) says of itself before its weights are read: tokenizer, context, adapter's base.

Apart from what loads weights, which takes torch and most of transformers seconds to import.
"""

from __future__ import annotations

import json
from pathlib import Path

from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from klimb.errors import KlimbError
from klimb.models import code

transformers_logging.disable_progress_bar()


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """The tokenizer beside the weights (of an adapter: its own copy, else its base model's)."""
    check_place(model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, **code.loading(model))
        if tokenizer.eos_token is None and tokenizer.sep_token is not None:
            tokenizer.eos_token = tokenizer.sep_token  # BERT's texts end with it, and it has no other name for that
        return tokenizer
    except (OSError, ValueError, KeyError) as error:
        raise KlimbError(f"model={model}: no tokenizer can be loaded from it ({first_line(error)})") from None


def base_of(model: str) -> str:
    """The model that a LoRA adapter belongs to; any other is its own. A path is made absolute: adapters remember it."""
    adapter = Path(model) / "adapter_config.json"
    base = str(json.loads(adapter.read_text())["base_model_name_or_path"]) if adapter.is_file() else model
    if base != model and base.startswith((".", "/", "~")) and not Path(base).exists():
        raise KlimbError(f"model={model}: an adapter whose base model {base} is not there; put it back, or mend "
                         f"base_model_name_or_path in {adapter}")  # fmt: skip
    return str(Path(base).resolve()) if Path(base).exists() else base


def declared_context(model: str) -> int:
    """`context_length` before the weights are loaded."""
    return context_length(_config(model))


def is_classifier(model: str) -> bool:
    """Are the weights there those of a sequence classifier, such as a reward model? No adapter is one."""
    if (Path(model) / "adapter_config.json").is_file():
        return False
    return any(name.endswith("ForSequenceClassification") for name in _config(model).architectures or [])


def _config(model: str) -> PretrainedConfig:
    base = base_of(model)
    check_place(base)
    try:
        found: PretrainedConfig = AutoConfig.from_pretrained(base, **code.loading(base))
        return found
    except (OSError, ValueError, KeyError) as error:
        raise KlimbError(f"model={model}: cannot be loaded ({first_line(error)})") from None


_FROM_PADDING = frozenset({
    "roberta", "xlm-roberta", "xlm-roberta-xl", "roberta-prelayernorm", "camembert", "data2vec-text", "longformer",
    "mpnet", "ibert", "esm",
})  # fmt: skip
"""Families whose first position is the one behind their padding's: BERT's 512 tokens of 514 positions."""


def context_length(config: PretrainedConfig) -> int:
    """Longest sequence the positions allow."""
    config = config.get_text_config()
    found = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or 1 << 30
    return int(found) - ((config.pad_token_id or 0) + 1 if config.model_type in _FROM_PADDING else 0)


def check_place(model: str) -> None:
    """What exists has to be a model; what looks like a path has to exist; anything else is a hub name."""
    path = Path(model)
    if path.exists() and not any((path / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise KlimbError(f"model={model}: not a model directory (no config.json in it); give a Hugging Face model "
                         "directory, the `model/` folder of a klimb run, or a hub name")  # fmt: skip
    if not path.exists() and (model.startswith((".", "/", "~")) or model.endswith("/") or model.count("/") > 1):
        raise KlimbError(f"model={model}: no such directory; give one that exists, or a hub name")


def first_line(error: Exception) -> str:
    """Of what transformers says when it cannot read a place; code that has to be trusted is told in klimb's words."""
    if "trust_remote_code" in str(error):
        return ("it needs Python code of its own, which runs only where that is typed: read it, then set "
                "trust_remote_code=true, and for a hub name revision=COMMIT")  # fmt: skip
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
