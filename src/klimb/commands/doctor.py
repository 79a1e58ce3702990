"""Can klimb train here, and does this job fit? Versions, devices, extras; and the memory plan of a stage."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from packaging.requirements import Requirement

from klimb import native
from klimb.errors import ConfigError, RewardError, did_you_mean, one_line
from klimb.models.load import resolve_dtype, without_bfloat16
from klimb.objective.algorithms import ALGORITHMS
from klimb.objective.preference import PREFERENCE_LOSSES
from klimb.rewards.sandbox import open_sandbox
from klimb.runtime.memory import available
from klimb.runtime.plan import gigabytes
from klimb.stages.common import target_of
from klimb.stages.memory import Target, fit, proposals
from klimb.stages.registry import STAGES, stage_config

_BF16 = ("amx_bf16", "avx512_bf16", "bf16")
"""Units for bfloat16, as Linux names them."""


class Finding(NamedTuple):
    """ok: None where nothing depends on it. fix: the line that brings what is missing."""

    part: str
    found: str
    ok: bool | None = True
    fix: str = ""


def examine() -> list[Finding]:
    """What klimb needs and what it can use, on this machine."""
    return [
        Finding("klimb", f"{metadata.version('klimb')}, Python {platform.python_version()}, {platform.platform()}"),
        *packages(metadata.requires("klimb") or []),
        *devices(),
        kernels(),
        sandbox(),
    ]


def packages(requirements: Sequence[str]) -> Iterator[Finding]:
    """Each that klimb needs; of its extras those that lack something, with what they lack."""
    extras: dict[str, list[str]] = {}
    for text in requirements:
        requirement = Requirement(text)
        found = _version(requirement.name)
        fits = found is not None and requirement.specifier.contains(found, prereleases=True)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            bounds = str(requirement.specifier)
            fix = "" if fits else f"pip install '{requirement.name}{bounds}'"
            yield Finding(requirement.name, found or f"missing, {bounds} is needed", fits, fix)
            continue
        extra = str(requirement.marker).partition("extra == ")[2].strip("\"'")
        extras.setdefault(extra, [])
        if not fits:
            extras[extra].append(requirement.name)
    for extra, lacking in extras.items():
        fix = f"pip install 'klimb[{extra}]'" if lacking else ""
        yield Finding(f"[{extra}]", f"without {', '.join(lacking)}" if lacking else "complete", None, fix)


def devices() -> Iterator[Finding]:
    threads = f"{torch.get_num_threads()} of {os.cpu_count()} cores in use"
    units = next((unit for unit in _BF16 if unit in _processor("flags", "Features").split()), None)
    bf16 = f"bfloat16 in hardware ({units})" if units else "no units for bfloat16: float32 is faster"
    free = gigabytes(available(torch.device("cpu")))
    yield Finding("cpu", f"{_processor('model name') or platform.machine()}, {threads}, {free} free, {bf16}")
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        total = gigabytes(torch.cuda.get_device_properties(device).total_memory)
        bf16 = "no bfloat16: float32 is used, dtype=float16 is faster" if without_bfloat16(device) else "bfloat16"
        told = f"{torch.cuda.get_device_name(device)}, {gigabytes(available(device))} of {total} free, {bf16}"
        yield Finding(str(device), told)
    if torch.backends.mps.is_available():
        yield Finding("mps", f"{gigabytes(available(torch.device('mps')))} free")
    if not torch.cuda.is_available() and not torch.backends.mps.is_available():
        yield Finding("gpu", f"torch {torch.__version__} sees none: device=auto is cpu", None)


def kernels() -> Finding:
    """Who computes attention and the small layers on a CPU."""
    reason = native.why_not()
    found = "klimb's own, compiled here" if reason is None else f"torch's operators, slower than klimb's own: {reason}"
    return Finding("kernels", found, True if reason is None else None)


def sandbox() -> Finding:
    """What the reward `code` would run in."""
    try:
        opened = open_sandbox(timeout=10.0)
    except RewardError as error:
        return Finding("sandbox", one_line(error).partition("; install ")[0], None, "apt install bubblewrap")
    opened.close()
    return Finding("sandbox", f"{opened.tier}: withstood the escape test", None)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _processor(*names: str) -> str:
    """A line of /proc/cpuinfo; empty where there is none."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() in names), "")


# Does it fit? ---------------------------------------------------------------------------------------------------------


class Answer(NamedTuple):
    """The plan of a job by lines, in bytes, and what would fit where it does not."""

    job: str
    place: str
    free: int
    peak: int
    checkpointing: bool
    lines: Mapping[str, int]
    proposals: Sequence[str]


def asked(words: Sequence[str], memory: float | None) -> Answer:
    """words: a stage, algorithm or loss, then key=value. memory: GB of a GPU to plan for instead of what is here.

    Data and reward may be left out. Raises KlimbError where a setting or the model's config is wrong.
    """
    name, overrides = words[0], list(words[1:])
    values: dict[str, Any] = {}
    if name in ALGORITHMS:
        stage, values["algorithm"] = "rl", name
    elif name in PREFERENCE_LOSSES:
        stage, values["loss"] = "preference", name
    elif name in STAGES:
        stage = name
    else:
        known = [*STAGES, *ALGORITHMS, *PREFERENCE_LOSSES]
        raise ConfigError(f"no stage, algorithm or loss {name!r}", where="doctor", fix=did_you_mean(name, known))
    values |= {"data": "any.jsonl"} if stage != "evaluate" else {}
    values |= {"reward": "exact"} if stage == "rl" else {}
    config = stage_config(stage, values, overrides, where="doctor")
    target = target_of(config)
    if memory is not None:
        dtype = torch.bfloat16 if config.dtype == "auto" else resolve_dtype(config.dtype, torch.device("cpu"))
        budget = 8192 if config.token_budget == "auto" else config.token_budget
        target = Target(dtype, budget, int(memory * 2**30), "a GPU")
    was = native.use(config.kernels != "torch")
    try:
        found = fit(config, target)
        proposed = proposals(config, target) if found.plan.peak > target.free else []
    finally:
        native.use(was)
    return Answer(
        f"{name} of {config.model}, {str(target.dtype).removeprefix('torch.')}, token_budget={target.budget}",
        target.place, target.free, found.plan.peak, found.checkpointing, found.plan.lines, proposed,
    )  # fmt: skip


def show(findings: Sequence[Finding]) -> None:
    """Marks in colour on a terminal, plain lines elsewhere."""
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    marks = {True: "[green]✓[/]", False: "[red]✗[/]", None: "[dim]·[/]"}
    width = max(len(finding.part) for finding in findings)
    for part, found, ok, fix in findings:
        console.print(f"{marks[ok]} ", end="")
        console.print(f"{part:{width}}  {found}" + (f"  → {fix}" if fix else ""), markup=False)
    missing = [finding.part for finding in findings if finding.ok is False]
    console.print(f"klimb cannot train here without {', '.join(missing)}" if missing else "klimb can train here")


def show_answer(answer: Answer, file: Any = None) -> None:
    lines = [answer.job, *(f"  {name:18} {gigabytes(count):>9}" for name, count in answer.lines.items())]
    fits = answer.peak <= answer.free
    lines.append(f"  {'at most, together':18} {gigabytes(answer.peak):>9}"
                 f"{', with checkpointing' if answer.checkpointing else ''}; {gigabytes(answer.free)} on {answer.place}"
                 f": {'it fits' if fits else 'it does not fit'}")  # fmt: skip
    lines += ["what does:" if not fits else "", *(f"  {proposal}" for proposal in answer.proposals)]
    print("\n".join(line for line in lines if line), file=file or sys.stdout)
