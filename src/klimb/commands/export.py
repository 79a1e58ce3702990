"""`klimb export`: a run's model as a folder to take away: weights, tokenizer, generation config and a model card."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from klimb.commands.card import model_card
from klimb.commands.trained import Trained, trained_run
from klimb.config import StageConfig, load_config
from klimb.errors import ConfigError, RunError
from klimb.runtime import durable


class ExportConfig(StageConfig):
    """What `klimb export RUN key=value …` takes."""

    out: str | None = Field(None, description="folder to write; default exports/NAME, NAME being the run's")
    lora: Literal["merged", "kept"] | None = Field(
        None, description="of a run with an adapter: merged into the base model's weights (default), or kept apart"
    )


def export(run: str, overrides: Sequence[str]) -> dict[str, Any]:
    """Writes the folder, whole or not at all, and returns where it is and what it holds.

    Full weights are copied as they are; an adapter is merged in the dtype that it was trained in. Raises RunError
    where `out` holds something, the run holds no model, or the disk is full.
    """
    config = load_config(ExportConfig, {}, overrides, where="command line")
    trained = trained_run(run)
    if config.lora and not trained.is_adapter:
        raise ConfigError(f"lora={config.lora}: the model in {trained.path} is no adapter, its weights are whole",
                          where="command line", fix="leave lora out")  # fmt: skip
    out = Path(config.out or Path("exports") / _name(trained.path.resolve()))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunError("is there already", where=out, why="klimb export writes over nothing", fix="choose another out")
    merged = trained.is_adapter and config.lora != "kept"
    with durable.explained("cannot write the folder", out, fix="make room, or choose another out"):
        durable.remove_folder(out)  # empty
        with durable.new_folder(out) as folder:
            if merged:
                _write_merged(trained, folder)
            else:
                shutil.copytree(trained.model, folder, dirs_exist_ok=True)
            (folder / "README.md").write_text(model_card(trained, folder, out.resolve().name), encoding="utf-8")
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    return {"model": str(out), "weights": "merged" if merged else "adapter" if trained.is_adapter else "whole",
            "files": sorted(file.name for file in out.iterdir()), "bytes": size}  # fmt: skip


def _write_merged(trained: Trained, folder: Path) -> None:
    import torch

    from klimb.models.backbone import Backbone
    from klimb.models.load import load_causal, save_causal
    from klimb.models.place import load_tokenizer
    from klimb.stages.trust import as_trained

    dtype = getattr(torch, str(trained.manifest["decisions"].get("dtype", "float32")))
    with as_trained(trained.manifest, trained.config, str(trained.model)):
        network, adapter = load_causal(str(trained.model), torch.device("cpu"), dtype)
        tokenizer = load_tokenizer(str(trained.model))
    save_causal(Backbone(network, adapter).model, tokenizer, folder, stop_tokens(trained.model, tokenizer))


def stop_tokens(model: Path, tokenizer: Any) -> list[int]:
    """Where generation ends, as the generation config beside the weights says, else at EOS."""
    from klimb.models.load import token_list

    file = model / "generation_config.json"
    ends = json.loads(file.read_text()).get("eos_token_id") if file.is_file() else None
    return token_list(tokenizer.eos_token_id if ends is None else ends)


def _name(run: Path) -> str:
    """`sft-1234abcd`; of a stage in a recipe's folder that of the recipe before it, of a seed that of its stage."""
    return run.name if run.parent.name in ("runs", "") else f"{run.parent.name}-{run.name}"
