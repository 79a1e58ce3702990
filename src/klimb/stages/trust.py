"""`trust_remote_code`: which models' own code a stage may run, and whether it still is what the manifest says."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from klimb.config import find_references
from klimb.errors import ConfigError, RunError
from klimb.models import code
from klimb.models.place import base_of
from klimb.rewards.spec import reward_files
from klimb.runtime.ranks import share
from klimb.runtime.run import Run

_KEY = "remote_code"
"""Of the manifest's decisions."""


def problems(model: str, trusts: bool, revision: str | None) -> Iterator[str]:
    """What is wrong with the two keys, by themselves."""
    if find_references(model):
        return  # of a recipe: known when the stage begins
    folder = Path(model).exists()
    if revision is not None and folder:
        yield f"revision: {model} is a folder and has none; leave it out"
    elif revision is not None and not re.fullmatch("[0-9a-f]{40}", revision):
        yield f"revision={revision}: a branch or tag can move; give the 40 hex digits of a commit"
    elif trusts and not folder and revision is None:
        yield f"trust_remote_code: {model} is no folder here; of a hub model, pin the code with revision=COMMIT"


def permitted(config: Any) -> AbstractContextManager[None]:
    """While this lasts, the models of a config are loaded as it says."""
    pins = _pins(config)
    places = {place: pin for model, pin in pins.items() for place in (base_of(model), model)}
    return code.pinned(places) if places else nullcontext()


def trust(config: Any, run: Run, say: Callable[[str], None]) -> None:
    """From here to the end of the run its models are loaded as its config says.

    What their code is known by stands in the manifest. Raises RunError where a run that goes on finds other code,
    ConfigError where there is none to trust.
    """
    run.closing.enter_context(permitted(config))
    pins = {model: pin for model, pin in _pins(config).items() if pin.trusted}
    if not pins:
        return
    marks = {model: code.fingerprint(base_of(model), pin.commit) for model, pin in pins.items()}
    found = {model: mark for model, mark in marks.items() if mark is not None}
    if not found:
        raise ConfigError("trust_remote_code: no model here has Python code of its own", where=config.model,
                          fix="leave it out")  # fmt: skip
    decided = share(run.decide(_KEY, lambda: found))
    for model, mark in found.items():
        _compare(model, decided.get(model), mark, fix="put it back, or start anew with --fresh")
        say(f"{model}: its own Python code runs here, {' '.join([*mark, *mark.values()])}")


def as_trained(manifest: Mapping[str, Any], config: Mapping[str, Any], model: str) -> AbstractContextManager[None]:
    """While this lasts, the model that a run made is loaded with the code that the run was allowed to run, if that is
    unchanged."""
    trusts, revision = bool(config.get("trust_remote_code")), config.get("revision")
    base = base_of(model)
    if trusts:
        _compare(
            base, manifest["decisions"][_KEY].get(config["model"]), code.fingerprint(base, revision), "put it back"
        )
    return code.pinned(pins_of(model, trusts, revision))


def _compare(model: str, then: Any, now: Any, fix: str) -> None:
    if then != now:
        raise RunError("its Python code is not that with which the run began", where=model,
                       why=f"then {then}, now {now}", fix=fix)  # fmt: skip


def pins_of(model: str, trusts: bool, revision: str | None) -> dict[str, code.Pin]:
    """Of a model, and of the base that it is an adapter of."""
    return dict.fromkeys((base_of(model), model), code.Pin(trusts, revision))


def _pins(config: Any) -> dict[str, code.Pin]:
    """By model as it was typed; of the further ones the folders alone, since the commit is that of `model`."""
    trusts, revision = getattr(config, "trust_remote_code", False), getattr(config, "revision", None)
    if not trusts and revision is None:
        return {}
    further = [getattr(config, "reference", None), getattr(config, "teacher", None)]
    further += [getattr(getattr(config, "critic", None), "model", None)]
    specs = [getattr(holder, key, None) for holder in (config, getattr(config, "measure", None))
             for key in ("reward", "gold", "other")]  # fmt: skip
    further += [str(path) for spec in specs for path in reward_files(spec) if path.is_dir()]
    folders = [model for model in further if model and Path(model).exists()]
    return dict.fromkeys(folders, code.Pin(trusts)) | {config.model: code.Pin(trusts, revision)}
