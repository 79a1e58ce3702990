"""What every training stage has: its settings, its device and threads, its journal."""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from klimb.config import StageConfig
from klimb.data.load import Transcripts
from klimb.data.mix import parts_of
from klimb.data.render import Renderer
from klimb.data.report import Loaded
from klimb.data.store import Chosen, Item
from klimb.errors import ConfigError, Interrupted, RewardError
from klimb.models.load import LoRA, resolve_device, resolve_dtype, without_bfloat16
from klimb.models.packing import Budget
from klimb.rollout.engine import Request
from klimb.runtime import checkpoint
from klimb.runtime.learner import LEARNING_RATES, Learner, Optimizer, Stage
from klimb.runtime.memory import available
from klimb.runtime.plan import Work
from klimb.runtime.ranks import gather, share
from klimb.runtime.rehearsal import FEW
from klimb.runtime.run import Run
from klimb.runtime.signals import Interrupt
from klimb.stages import kernels
from klimb.stages.given import Data
from klimb.stages.memory import Target, admitted
from klimb.stages.moment import Moment, leave
from klimb.stages.progress import Live, Preparing, live_line
from klimb.stages.trust import problems, trust
from klimb.types import Group


class RunConfig(StageConfig):
    """Settings that all stages share."""

    model: str = Field(description="directory or hub name; an existing path wins")
    columns: dict[str, str] = Field({}, description="names of your columns: {prompt: question}")
    transcripts: Transcripts = Field(
        "text", description="chat: texts of Human: and Assistant: turns are messages, for the chat template"
    )
    on_bad: Literal["error", "drop"] = Field(
        "error", description="rows that cannot be used stop the run, or go, counted"
    )
    out: str | None = Field(None, description="run directory; default runs/NAME-HASH")
    trust_remote_code: bool = Field(False, description="run the Python code that comes with the model; read it before")
    revision: str | None = Field(None, description="commit of a hub model, 40 hex digits")
    seed: int = Field(0, ge=0)
    device: str = Field("auto", description="auto: cuda, else mps where nothing is sampled, else cpu")
    dtype: str = Field("auto", description="auto: bfloat16 on a GPU that computes in it, else float32")
    threads: int | None = Field(None, ge=1, description="CPU threads; default: all cores")
    token_budget: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto",
        description="flat tokens in a micro-batch: bounds memory, changes no result. auto: 1024 on a CPU, else "
        "8192, and up to four prompts where groups share long ones",
    )
    kernels: Literal["auto", "native", "torch"] = Field(
        "auto", description="who computes attention and small layers on a CPU; auto: klimb's C, else torch"
    )
    method: str = Field("", description="how the result is called in tables and pictures")

    @model_validator(mode="after")
    def _without_contradiction(self) -> Self:
        if found := list(self.contradictions()):
            raise ValueError("; ".join(found))
        return self

    def contradictions(self) -> Iterator[str]:
        """Settings that exclude each other, and those that nothing would look at, each with the way out."""
        yield from problems(self.model, self.trust_remote_code, self.revision)

    def work(self, context: int) -> Work:
        """What the stage holds and computes, for the memory plan. context: tokens that the model takes."""
        raise NotImplementedError

    def given(self, key: str) -> bool:
        """Was `key` set to anything but its default?"""
        return bool(getattr(self, key) != type(self).model_fields[key].default)


class TrainConfig(RunConfig):
    """Settings that all training stages share."""

    data: Data = Field(description="file, several, or hub name: owner/name[/config][:split]")
    lora: LoRA | None = None
    optimizer: Optimizer = Optimizer()
    checkpointing: Literal["auto", "on", "off"] = Field(
        "auto",
        description="on: activations are computed again in the backward pass: less memory, a third more time; "
        "auto: where they would not fit otherwise",
    )
    checkpoint_every: int = Field(50, ge=0, description="steps between checkpoints; 0: none but at Ctrl-C")


class SupervisedConfig(TrainConfig):
    """Settings of the stages that pass over rows: for how long, and what is held out."""

    steps: int | None = Field(None, ge=1, description="default: `epochs` passes over the data")
    epochs: float = Field(1.0, gt=0, description="passes over the data, where no steps are given")
    max_tokens: int | None = Field(None, ge=1, description="longest row; default: the model's context")
    eval_data: Data = Field(None, description="held-out rows; or eval_fraction of `data`")
    eval_fraction: float = Field(0.0, ge=0, lt=1, description="share of the prompts held out, by hash")
    eval_every: int = Field(50, ge=1)

    def contradictions(self) -> Iterator[str]:
        yield from super().contradictions()
        if self.given("steps") and self.given("epochs"):
            yield "steps and epochs both say how long to train: give one of them"
        if self.given("eval_data") and self.given("eval_fraction"):
            yield "eval_data and eval_fraction both say what is held out: give one of them"
        if self.given("eval_every") and not (self.given("eval_data") or self.given("eval_fraction")):
            yield "eval_every: nothing is held out to evaluate on; give eval_data or eval_fraction"


def token_budget(config: RunConfig, device: torch.device) -> int:
    """A CPU is as fast with 1,024 tokens at a time as with 8,192, in well under half of the memory (docs/LOG.md)."""
    if config.token_budget != "auto":
        return config.token_budget
    return 1024 if device.type == "cpu" else 8192


def device_of(config: RunConfig) -> torch.device:
    """Where a stage runs, by what it does there."""
    measures = any(getattr(config, key, None) is not None for key in ("measure", "until"))
    return resolve_device(config.device, samples=measures or hasattr(config, "samples_per_prompt"))


def on_an_old_card(config: RunConfig, device: torch.device, dtype: torch.dtype) -> str | None:
    """A line where bfloat16 would have been chosen and the card lacks it, or where it was asked for all the same."""
    card = without_bfloat16(device)
    if card is None or not (config.dtype == "auto" or dtype == torch.bfloat16):
        return None
    told = "it is emulated, slower than float32" if dtype == torch.bfloat16 else "computing in float32"
    return f"{device}: {card} has no bfloat16: {told}; dtype=float16 is faster, the loss is scaled for it"


def target_of(config: RunConfig) -> Target:
    """What a new run of this config would run on."""
    device = device_of(config)
    dtype = resolve_dtype(config.dtype, device)
    return Target(dtype, token_budget(config, device), available(device), str(device))


@dataclass
class Session:
    """One run of one stage in this process: what it runs on, and the journal of its steps."""

    run: Run
    interrupt: Interrupt
    device: torch.device
    dtype: torch.dtype
    say: Callable[[str], None]
    token_budget: int
    checkpointing: bool
    scoring: Budget
    """For passes without gradient."""
    learners: dict[str, Learner] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)
    timings: dict[str, float] = field(default_factory=dict)
    live: Live | None = None
    """Where progress is drawn, if it is: on a terminal, for who is told by `say_aside`."""
    _unsaved: Moment | None = None
    _shown: float = 0.0
    _trained_on: np.ndarray | None = None

    @staticmethod
    def begin(config: RunConfig, run: Run, interrupt: Interrupt, say: Callable[[str], None]) -> Session:
        """Fix whatever can change rounding, as it was when the run began."""
        trust(config, run, say)
        device = device_of(config)
        threads = share(run.decide("threads", lambda: config.threads or torch.get_num_threads()))
        torch.set_num_threads(int(threads))
        dtype = share(run.decide("dtype", lambda: str(resolve_dtype(config.dtype, device)).removeprefix("torch.")))
        budget = share(run.decide("token_budget", lambda: token_budget(config, device)))
        kernels.use(run, str(share(run.decide("kernels", lambda: kernels.choose(config.kernels, device, say)))))
        checkpointing = _planned(
            config, run, Target(getattr(torch, dtype), int(budget), available(device), str(device)), say
        )
        if line := on_an_old_card(config, device, getattr(torch, dtype)):
            say(line)
        torch.manual_seed(config.seed)
        live = live_line(run.manifest["name"]) if say is say_aside else None
        if live is not None:
            run.closing.callback(live.close)
        scoring = Budget(int(budget), say)
        session = Session(
            run, interrupt, device, getattr(torch, dtype), say, int(budget), checkpointing, scoring, live=live
        )
        run.closing.push(session._ended)
        return session

    def learner(
        self, name: str, stage: Stage, parameters: Mapping[str, torch.nn.Parameter], optimizer: Optimizer,
        total_steps: int,
    ) -> Learner:  # fmt: skip
        """A learner that checkpoints know by `name`; its rate is the optimizer's or the table's."""
        if not parameters:
            raise ConfigError(f"{name}: nothing to train, the model has no trainable parameter")
        lora = any("lora_" in path for path in parameters)  # a critic of its own is trained whole beside an adapter
        rate = optimizer.lr if optimizer.lr is not None else LEARNING_RATES[stage][lora]
        trained = sum(p.numel() for p in parameters.values())
        source = "" if optimizer.lr is not None else f" (table: {stage}, {'LoRA' if lora else 'full'})"
        self.say(f"{name}: {trained:,} trained parameters, lr {rate:g}{source}")
        self.learners[name] = Learner(
            parameters, optimizer, lr=rate, total_steps=total_steps, budget=self.token_budget, say=self.say,
            scaled=self.dtype == torch.float16,
        )  # fmt: skip
        return self.learners[name]

    def read(
        self, load: Callable[..., Loaded[Item]], source: Any, config: RunConfig, renderer: Renderer, max_length: int,
        key: str = "data",
    ) -> Loaded[Item]:  # fmt: skip
        """Data through one of `klimb.data.load`. What was found is said, and stands in the manifest under `key`; what
        was dropped is kept as events."""
        progress = Preparing(f"{self.live.name}: {key}" if self.live else key, self.live, self.say)
        data = load(
            source, renderer, max_length=max_length, columns=config.columns, on_bad=config.on_bad,
            transcripts=config.transcripts, cache=True, progress=progress,
        )  # fmt: skip
        self.run.decide("conversational", lambda: data.conversational)  # how the model is asked from then on
        self.say(str(data.report))
        for problem in data.report.dropped:
            self.run.event("row_dropped", str(problem))
        self.run.found(key, {**data.report.facts(), **self.overlap(key, data.items)})
        return data

    def overlap(self, key: str, items: Chosen[Item]) -> dict[str, int]:
        """How many of the prompts that something is measured on are trained on, too: said, and for the manifest."""
        if key == "data":
            self._trained_on = items.keys()
            return {}
        if self._trained_on is None or key == "reference":
            return {}
        shared = int(np.isin(items.keys(), self._trained_on).sum())
        if shared:
            self.say(f"  {shared:,} of the {len(items):,} prompts of {key} are in the training data, too")
        return {"also_trained_on": shared}

    def steps(self, start: int, total: int) -> Iterator[int]:
        """The numbers of the steps that are left; events carry that of the step in progress."""
        if self.live is not None:
            self.live.begin(self.live.name, done=start, total=total)
        rehearsal = self.interrupt.rehearsal
        for step in range(start + 1, total + 1):
            if rehearsal is not None and rehearsal.enough(total):
                return
            self.run.step = step
            yield step

    @contextmanager
    def sampling(self, purpose: str, requests: list[Request]) -> Iterator[list[Request]]:
        """Samples are drawn outside the steps, to measure or to keep them; in a dry run a part of them."""
        if self.live is not None:
            self.live.begin(self.live.name if purpose == self.live.name else f"{self.live.name}: {purpose}")
        if self.interrupt.rehearsal is None:
            yield requests
            return
        with self.interrupt.rehearsal.part(requests) as some:
            yield some

    def between_groups(self, _: Group) -> None:
        """Asked to leave outside the steps: what is drawn there is not kept, so that nothing is waited for."""
        if self.interrupt.requested:
            leave(self._unsaved, self.run, self.learners)

    def at_the_end(self, items: Chosen[Item]) -> Chosen[Item]:
        """What a stage goes through when it has trained; in a dry run a few of them."""
        return items if self.interrupt.rehearsal is None else items.part(np.arange(min(FEW, len(items))))

    @property
    def on_tokens(self) -> Callable[[int], None] | None:
        """Who counts an engine's tokens, if anybody looks."""
        return self.live.count if self.live is not None else None

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        if self.live is not None:
            self.live.phase()
        start = time.perf_counter()
        yield
        self.timings[what] = self.timings.get(what, 0.0) + time.perf_counter() - start

    # The journal ----------------------------------------------------------------------------------------------------

    def resume(self) -> checkpoint.Checkpoint | None:
        """The newest intact checkpoint, its learners loaded, and the run's files cut back to it."""
        found = checkpoint.load_latest(self.run.checkpoints, self.run.report)
        self.run.truncate(found.step if found else -1)
        if found:
            for name, learner in self.learners.items():
                learner.load(found.tensors[name], int(found.state["learners"][name]))
            self.say(f"continuing after step {found.step}")
        return found

    def end_step(
        self, step: int, total: int, measured: Mapping[str, float], *, every: int, state: dict[str, Any],
        tensors: Mapping[str, Tensor] | None = None, reference: Mapping[str, Tensor] | None = None,
        samples: Sequence[Mapping[str, Any]] = (),
    ) -> None:  # fmt: skip
        """Log step `step` of `total`, save when it is due, leave when Ctrl-C asked for it.

        reference: weights of one that moves.
        """
        if samples:
            self.run.write_samples(step, samples)
        self.run.log(step, {**measured, **{f"time/{k}": v for k, v in self.timings.items()}})
        self._show(step, total, measured)
        self.timings = {}
        due = bool(every) and (step % every == 0 or step == total)
        leaving = any(gather(self.interrupt.requested))  # a signal reaches one rank before another
        now = Moment.of(step, total, self.learners, state, tensors or {}, reference or {})
        if due or leaving:
            now.save(self.run, self.learners)
        if leaving:
            raise Interrupted(now.told(self.run))
        self._unsaved = None if due else now

    def _ended(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """A reward that ends the run, by silence or by failing too often, costs no step that was done."""
        if isinstance(error, RewardError) and self._unsaved is not None and self.interrupt.rehearsal is None:
            self._unsaved.rescue(error, self.run, self.learners, leaving=self.interrupt.requested)

    def _show(self, step: int, total: int, plain: Mapping[str, float]) -> None:
        """One line at most every two seconds (and for the last step): who waits wants to see it move.

        Where a live line moves, that of the last step is left.
        """
        if self.live is not None:
            seconds = self.timings.get("rollout", self.timings.get("train", 0.0))
            rate = plain["tokens"] / seconds if "tokens" in plain and seconds else None
            drawn = [key for key in _LIVE if key in plain][:3]
            self.live.step(step, rate, "  ".join(f"{key} {plain[key]:.4g}" for key in drawn))
            if step != total:
                return
        now = time.monotonic()
        if now - self._shown < 2 and step != total:
            return
        self._shown = now
        known = [key for key in _SHOWN if key in plain]
        self.say(f"  step {step}/{total}  " + "  ".join(f"{key} {plain[key]:.4g}" for key in known))


_LIVE = ("reward/mean", "gold/mean", "kl", "loss", "accuracy")
_SHOWN = (
    "loss", "accuracy", "eval/loss", "eval/accuracy", "reward/mean", "gold/mean", "kl", "entropy", "length/mean",
    "clip_fraction", "critic/explained_variance", "tokens_per_second",
)  # fmt: skip


def _planned(config: RunConfig, run: Run, target: Target, say: Callable[[str], None]) -> bool:
    """Are activations computed again? The plan behind it stands in the manifest."""
    decided = run.manifest["decisions"].get("checkpointing")
    if decided is not None and isinstance(config, TrainConfig):
        config = config.model_copy(update={"checkpointing": "on" if decided else "off"})
    found = admitted(config, target, say)
    if found is not None:
        run.decide("memory", lambda: {"free": target.free, "peak": found.plan.peak, "lines": found.plan.lines})
    on = found.checkpointing if found is not None else getattr(config, "checkpointing", "off") == "on"
    return bool(share(run.decide("checkpointing", lambda: on)))


def stream_seed(seed: int, purpose: str, step: int = 0) -> int:
    """Seed of the random streams of one purpose at one step: (seed, purpose, step) and nothing hidden."""
    digest = hashlib.blake2b(f"{seed}/{purpose}/{step}".encode(), digest_size=6).digest()
    return int.from_bytes(digest, "little")


def say_aside(line: str) -> None:
    """Progress goes to standard error: standard output is for results."""
    print(line, file=sys.stderr, flush=True)


def inputs_of(config: RunConfig, *further: Any) -> dict[str, Path | str]:
    """The files and folders that a config points at, for hashes; each once."""
    inputs: dict[str, Path | str] = {}
    for section in ("", "measure", "until", "critic"):
        holder = getattr(config, section, None) if section else config
        for key in ("model", "data", "eval_data", "reference", "teacher"):
            value = getattr(holder, key, None)
            alone = isinstance(value, str | Path) or not key.endswith("data")
            paths = [value] if alone else [path for path, _ in parts_of(value) or []]
            for number, path in enumerate(paths):
                source = Path(path) if isinstance(path, str) and Path(path).exists() else path
                if isinstance(source, str | Path) and source not in inputs.values():
                    inputs[f"{section}.{key}".lstrip(".") + (f"[{number}]" if path is not value else "")] = source
    for path in further:
        inputs[f"file:{path}"] = Path(path)
    return inputs
