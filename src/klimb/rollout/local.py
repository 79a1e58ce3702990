"""Generation in the trainer's process, on the trainer's weights: nothing to copy, nothing to fall out of step.

Continuous batching: a prompt is computed and stored once for all its samples, every running sample owns a slot of a KV
cache, finished samples leave, the last running ones move into their slots, new ones take the places.
Tokens, log-probs and random numbers live in tensors by slot; Python touches a sample when it starts and when it ends.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from klimb.errors import KlimbError
from klimb.models.cache import Decode, KVCache, Prefill, Seats
from klimb.models.faces import Policy
from klimb.rollout.engine import Request
from klimb.rollout.sampling import SamplingParams, draw, stream_key, uniforms
from klimb.types import Finish, Sample, Segment, Text


@dataclass
class _Slots:
    """State of the running samples; line i of every tensor belongs to slot i."""

    tokens: Tensor
    logps: Tensor
    versions: Tensor
    uniforms: Tensor
    drawn: Tensor
    last: Tensor
    prompt_lengths: Tensor
    owners: list[tuple[Request, int]] = field(default_factory=list)
    prompts: list[int] = field(default_factory=list)
    """Place of each one's prompt in the cache."""
    seats: Seats | None = None
    """Known again when somebody came or went."""

    @staticmethod
    def empty(slots: int, length: int, device: torch.device) -> _Slots:
        def zeros(dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        long, single, double = torch.long, torch.float32, torch.float64
        return _Slots(
            zeros(long, slots, length), zeros(single, slots, length), zeros(long, slots, length),
            zeros(double, slots, length), zeros(long, slots), zeros(long, slots), zeros(long, slots),
        )  # fmt: skip

    def move(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        lines = torch.tensor([sources, targets], device=self.tokens.device)
        stores = (self.tokens, self.logps, self.versions, self.uniforms, self.drawn, self.last, self.prompt_lengths)
        for store in stores:
            store[lines[1]] = store[lines[0]]
        for source, target in zip(sources, targets, strict=True):
            self.owners[target] = self.owners[source]
            self.prompts[target] = self.prompts[source]


class LocalEngine:
    """A `RolloutEngine` over a policy in this process.

    max_rows: samples that run side by side. on_tokens: told how many tokens each step produced (for a progress bar).
    view: tokens → the text that reward functions see.
    """

    def __init__(
        self,
        policy: Policy,
        view: Callable[[list[int]], Text],
        *,
        max_rows: int = 128,
        refill_share: float = 0.25,
        on_tokens: Callable[[int], None] | None = None,
    ) -> None:
        self.policy = policy
        self.view = view
        self.max_rows = max_rows
        self.refill_at = max(1, int(max_rows * refill_share))
        self.on_tokens = on_tokens
        self.version = 0
        self.paused = False
        self.queue: deque[tuple[Request, int]] = deque()
        self.cache: KVCache | None = None
        self.slots: _Slots | None = None

    # The protocol ---------------------------------------------------------------------------------------------------

    def submit(self, requests: Sequence[Request]) -> None:
        for request in requests:
            needed = len(request.prompt.tokens) + request.params.max_tokens
            if needed > self.policy.backbone.context:
                raise KlimbError(
                    f"prompt {request.prompt.id}: {len(request.prompt.tokens)} tokens + max_tokens="
                    f"{request.params.max_tokens} exceed the model's context of {self.policy.backbone.context}; "
                    "lower max_tokens or max_prompt_tokens"
                )
            self.queue.extend((request, request.first + i) for i in range(request.samples))

    def update_weights(self, version: int) -> None:
        self.version = version

    def pause(self) -> None:
        self.paused = True

    def resume(self) -> None:
        self.paused = False

    def abort(self) -> None:
        """Whatever runs or waits comes out of the stream with finish "abort"."""
        self.queue = deque((request, ~index) for request, index in self.queue)
        if self.slots is not None:
            self.slots.owners = [(request, ~index) for request, index in self.slots.owners]

    @torch.inference_mode()  # fewer checks a call than no_grad; what leaves is plain numbers
    def stream(self) -> Iterator[tuple[Request, Sample]]:
        while not self.paused and (self.queue or self._running):
            yield from self._take_aborted()
            free = self.max_rows - self._running
            if self.queue and (free >= self.refill_at or not self._running):
                self._prefill(free)
            elif self._running:
                self._decode()
            yield from self._take_finished()
        if not self._running:
            self.slots = self.cache = None  # until the next rollout the memory is the trainer's

    # One step -------------------------------------------------------------------------------------------------------

    @property
    def _running(self) -> int:
        return len(self.slots.owners) if self.slots is not None else 0

    def _prefill(self, free: int) -> None:
        """Start as many waiting samples as there are free slots: each prompt once, then a first token for each."""
        new = [self.queue.popleft() for _ in range(min(free, len(self.queue)))]
        runs = [(request, len(list(run))) for request, run in itertools.groupby(new, key=lambda item: item[0])]
        slots, cache = self._allocate([request for request, _ in runs])
        device = self.policy.backbone.device
        flat: list[int] = []
        prompts: list[range] = []
        first, first_prompt = len(slots.owners), max(slots.prompts, default=-1) + 1
        for place, (request, samples) in enumerate(runs):
            prompts.append(range(len(flat), len(flat) + len(request.prompt.tokens)))
            flat.extend(request.prompt.tokens)
            slots.prompts += [first_prompt + place] * samples
        plan = Prefill.of(cache, prompts, first_prompt, device)
        ends = torch.tensor([prompt[-1] for prompt in prompts], device=device)
        logits = self._logits(torch.tensor(flat, device=device), plan.positions, plan, ends)
        rows = slice(first, first + len(new))
        keys = [stream_key(request.seed, request.prompt.id, index) for request, index in new]
        slots.uniforms[rows] = uniforms(keys, slots.uniforms.shape[1]).to(device)
        slots.drawn[rows] = 0
        slots.prompt_lengths[rows] = torch.tensor([len(r.prompt.tokens) for r, _ in new], device=device)
        slots.owners.extend(new)
        slots.seats = None
        self._draw(logits.repeat_interleave(torch.tensor([samples for _, samples in runs], device=device), dim=0), rows)

    def _decode(self) -> None:
        """One further token for every running sample."""
        slots, cache = self.slots, self.cache
        assert slots is not None
        assert cache is not None
        rows = slice(0, self._running)
        drawn = slots.drawn[rows]
        slots.seats = slots.seats or Seats(slots.prompts, drawn.device)
        plan = Decode(cache, slots.seats, slots.prompt_lengths[rows], drawn)
        logits = self._logits(slots.last[rows], plan.position, plan, plan.rows)
        self._draw(logits, rows)

    def _logits(self, tokens: Tensor, positions: Tensor, plan: Prefill | Decode, keep: Tensor) -> Tensor:
        self.policy.backbone.use(self.policy.adapter)
        states = self.policy.backbone.states(tokens, positions, plan, keep, logits=self.policy.own_head)
        return self.policy.head().logits(states)

    def _draw(self, logits: Tensor, rows: slice) -> None:
        slots = self.slots
        assert slots is not None
        params = self._params()
        place = slots.drawn[rows, None]
        u = slots.uniforms[rows].gather(1, place).squeeze(1)
        seen = self._seen(rows, logits.shape[-1]) if params.repetition_penalty != 1 else None
        tokens, logps = draw(logits, u, params, seen)
        slots.last[rows] = tokens
        slots.tokens[rows].scatter_(1, place, tokens[:, None])
        slots.logps[rows].scatter_(1, place, logps.float()[:, None])
        slots.versions[rows].scatter_(1, place, self.version)
        slots.drawn[rows] += 1
        if self.on_tokens is not None:
            self.on_tokens(len(tokens))

    def _seen(self, rows: slice, vocabulary: int) -> Tensor:
        """Tokens that each completion holds already: [n, V] bool."""
        slots = self.slots
        assert slots is not None
        tokens = slots.tokens[rows]
        valid = torch.arange(tokens.shape[1], device=tokens.device)[None, :] < slots.drawn[rows, None]
        seen = torch.zeros(len(tokens), vocabulary + 1, dtype=torch.bool, device=tokens.device)
        return seen.scatter_(1, torch.where(valid, tokens, vocabulary), True)[:, :vocabulary]

    def _params(self) -> SamplingParams:
        assert self.slots is not None
        return self.slots.owners[0][0].params

    # Who comes and who goes -----------------------------------------------------------------------------------------

    def _allocate(self, new: Sequence[Request]) -> tuple[_Slots, KVCache]:
        """Slots and cache with room for these prompts and their samples beside what runs."""
        running = self.slots.owners if self.slots else []
        if len({request.params for request in [*new, *(request for request, _ in running)]}) > 1:
            raise KlimbError("requests that run side by side must share their sampling parameters")
        length = new[0].params.max_tokens
        prompt_length = max(len(request.prompt.tokens) for request in new)
        if self.slots is None:
            self.slots = _Slots.empty(self.max_rows, length, self.policy.backbone.device)
        prompts = max(self.slots.prompts, default=-1) + 1 + len(new)
        if self.cache is None:
            self.cache = KVCache(prompts, prompt_length, self.max_rows, length)
        self.cache.grow(prompts, prompt_length)
        return self.slots, self.cache

    def _take_finished(self) -> Iterator[tuple[Request, Sample]]:
        slots = self.slots
        if slots is None or not slots.owners:
            return
        rows = slice(0, len(slots.owners))
        params = self._params()
        stop = torch.tensor(sorted(params.stop), device=slots.last.device)
        stopped = (slots.last[rows, None] == stop).any(1)
        ended = (stopped | (slots.drawn[rows] >= params.max_tokens)).nonzero().flatten().tolist()
        if ended:
            reasons: list[Finish] = ["stop" if s else "length" for s in stopped.tolist()]
            yield from self._release(ended, reasons)

    def _take_aborted(self) -> Iterator[tuple[Request, Sample]]:
        while self.queue and self.queue[0][1] < 0:
            request, index = self.queue.popleft()
            yield request, Sample(request.prompt.id, ~index, [], "abort")
        owners = self.slots.owners if self.slots is not None else []
        aborted = [i for i, (_, index) in enumerate(owners) if index < 0]
        if aborted:
            yield from self._release(aborted, ["abort"] * len(owners))

    def _release(self, leaving: list[int], reasons: Sequence[Finish]) -> Iterator[tuple[Request, Sample]]:
        """Read the leaving samples out, then close their slots with the last running ones."""
        slots, cache = self.slots, self.cache
        assert slots is not None
        assert cache is not None
        finished = [self._sample(i, reasons[i]) for i in leaving]
        running = len(slots.owners) - len(leaving)
        gone = set(leaving)
        holes = [i for i in leaving if i < running]
        movers = [i for i in range(running, len(slots.owners)) if i not in gone]
        if holes:
            cache.move(movers, holes)
            slots.move(movers, holes)
        del slots.owners[running:], slots.prompts[running:]
        slots.seats = None
        self._close_prompts()
        yield from finished

    def _close_prompts(self) -> None:
        """Prompts whose samples are all gone make place for the last ones in use."""
        slots, cache = self.slots, self.cache
        assert slots is not None
        assert cache is not None
        used = sorted(set(slots.prompts))
        holes = sorted(set(range(len(used))) - set(used))
        if holes:
            movers = used[-len(holes) :]
            cache.move_prompts(movers, holes)
            place = dict(zip(movers, holes, strict=True))
            slots.prompts = [place.get(prompt, prompt) for prompt in slots.prompts]

    def _sample(self, slot: int, finish: Finish) -> tuple[Request, Sample]:
        slots = self.slots
        assert slots is not None
        request, index = slots.owners[slot]
        n = int(slots.drawn[slot])
        tokens = slots.tokens[slot, :n].tolist()
        segment = Segment(tokens, True, slots.logps[slot, :n].tolist(), slots.versions[slot, :n].tolist())
        sample = Sample(request.prompt.id, ~index if index < 0 else index, [segment], finish, self.view(tokens))
        return request, sample
