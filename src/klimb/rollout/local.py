"""Generation in the trainer's process, on the trainer's weights: nothing to copy, nothing to fall out of step.

Continuous batching: a prompt is computed and stored once for all its samples, whichever request asks for them and
whenever they start; every running sample owns a slot of a KV cache, finished samples leave, the last running ones move
into their slots, new ones take the places.
Tokens, log-probs and random numbers live in tensors by slot; Python touches a sample when it starts and when it ends.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from klimb.errors import KlimbError, out_of_memory
from klimb.models.cache import Decode, KVCache, Prefill, Seats
from klimb.models.faces import Policy
from klimb.models.linears import Ready, decoding
from klimb.models.logprobs import Head
from klimb.rollout.engine import Request
from klimb.rollout.mixture import Mixture
from klimb.rollout.sampling import SamplingParams, draw, stream_key, uniforms
from klimb.types import Finish, Sample, Segment, Text

_LENGTH = 128
"""Tokens of a sample that the cache has room for at first; it doubles where some grow longer."""

_FEW = 16
"""Prompt tokens that are computed at once in the least memory."""


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
    stop: Tensor
    longest: int = 0
    """Tokens of the longest sample."""
    owners: list[tuple[Request, int]] = field(default_factory=list)
    prompts: list[int] = field(default_factory=list)
    """Place of each one's prompt in the cache."""
    seats: Seats | None = None
    """Known again when somebody came or went."""

    @staticmethod
    def empty(slots: int, params: SamplingParams, device: torch.device) -> _Slots:
        length = params.max_tokens

        def zeros(dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        long, single, double = torch.long, torch.float32, torch.float64
        return _Slots(
            zeros(long, slots, length), zeros(single, slots, length), zeros(long, slots, length),
            zeros(double, slots, length), zeros(long, slots), zeros(long, slots), zeros(long, slots),
            torch.tensor(sorted(params.stop), dtype=torch.long, device=device),
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

    max_rows: samples that run side by side. prefill_tokens: prompt tokens computed at once; longer prompts are computed
    in pieces. Both fall where they do not fit into the memory. on_tokens: told how many tokens each step produced (for
    a progress bar). say: gets lines for a person. view: tokens → the text that reward functions see.
    """

    def __init__(
        self,
        policy: Policy | Mixture,
        view: Callable[[list[int]], Text],
        *,
        max_rows: int = 128,
        refill_share: float = 0.25,
        prefill_tokens: int = 4096,
        on_tokens: Callable[[int], None] | None = None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.policy = policy
        self.view = view
        self.max_rows = max_rows
        self.refill_at = max(1, int(max_rows * refill_share))
        self.prefill_tokens = prefill_tokens
        self.on_tokens = on_tokens
        self.say = say
        self.version = 0
        self.paused = False
        self.queue: deque[tuple[Request, int]] = deque()
        self.cache: KVCache | None = None
        self.slots: _Slots | None = None
        self.stored: dict[tuple[int, ...], tuple[int, Tensor]] = {}
        """Prompts that today's weights computed: place in the cache, and the state [d] that predicts what follows."""
        self._head: Head | None = None
        self._weights: Ready | None = None
        """Today's head and weights, ready for many calls."""

    # The protocol ---------------------------------------------------------------------------------------------------

    def submit(self, requests: Sequence[Request]) -> None:
        for request in requests:
            needed = len(request.prompt.tokens) + request.params.max_tokens
            if needed > self.policy.context:
                raise KlimbError(
                    f"prompt {request.prompt.id}: {len(request.prompt.tokens)} tokens + max_tokens="
                    f"{request.params.max_tokens} exceed the model's context of {self.policy.context}; "
                    "lower max_tokens or max_prompt_tokens"
                )
            self.queue.extend((request, request.first + i) for i in range(request.samples))
        # Equal prompts stand together, so that the place of one is kept until its last sample has started, no longer.
        turns: dict[tuple[int, ...], int] = {}
        prompts = {id(request): tuple(request.prompt.tokens) for request, _ in self.queue}
        turn = {request: turns.setdefault(prompt, len(turns)) for request, prompt in prompts.items()}
        self.queue = deque(sorted(self.queue, key=lambda item: (item[1] >= 0, turn[id(item[0])])))

    def update_weights(self, version: int) -> None:
        self.version = version
        self._forget()

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
        try:
            while not self.paused and (self.queue or self._running):
                yield from self._take_aborted()
                free = self.max_rows - self._running
                try:
                    if self.queue and (free >= self.refill_at or not self._running):
                        self._prefill(free)
                    elif self._running:
                        self._decode()
                    fits = True
                except (RuntimeError, MemoryError) as error:
                    if not out_of_memory(error):
                        raise
                    fits = False  # here what was computed is still held, below it is not
                if not fits:
                    self._start_over()
                yield from self._take_finished()
        finally:
            self._head = self._weights = None  # whoever asked may never come back
        if not self._running:
            self.slots = self.cache = None  # until the next rollout the memory is the trainer's
            self._forget()

    @property
    def newest(self) -> list[int]:
        """The token that each running sample drew last: for whoever shows a text while it is written."""
        return self.slots.last[: self._running].tolist() if self.slots is not None else []

    # One step -------------------------------------------------------------------------------------------------------

    @property
    def _running(self) -> int:
        return len(self.slots.owners) if self.slots is not None else 0

    def _prefill(self, free: int) -> None:
        """Start as many waiting samples as there are free slots: a first token for each, each new prompt once."""
        new = list(itertools.islice(self.queue, free))
        runs = [
            (tuple(prompt), len(list(run)))
            for prompt, run in itertools.groupby(new, key=lambda item: item[0].prompt.tokens)
        ]
        slots = self._slots_for([request for request, _ in new])
        self.cache = self.cache or KVCache()
        self.cache.grow_slots(len(slots.owners) + len(new), min(_LENGTH, slots.tokens.shape[1]))
        self._store([prompt for prompt, _ in runs if prompt not in self.stored])
        device = self.policy.device
        rows = slice(len(slots.owners), len(slots.owners) + len(new))
        keys = [stream_key(request.seed, request.prompt.id, index) for request, index in new]
        slots.uniforms[rows] = uniforms(keys, slots.uniforms.shape[1]).to(device)
        slots.drawn[rows] = 0
        slots.prompt_lengths[rows] = torch.tensor([len(r.prompt.tokens) for r, _ in new], device=device)
        slots.owners.extend(self.queue.popleft() for _ in new)
        for prompt, samples in runs:
            slots.prompts += [self.stored[prompt][0]] * samples
        slots.longest = max(slots.longest, 1)
        slots.seats = None
        logits = self._logits(torch.stack([self.stored[prompt][1] for prompt, _ in runs]))
        counts = torch.tensor([samples for _, samples in runs], device=device)
        self._draw(logits.repeat_interleave(counts, dim=0, output_size=len(new)), rows)

    def _store(self, prompts: Sequence[tuple[int, ...]]) -> None:
        """Compute prompts and put each into a place of its own behind those in use."""
        if not prompts:
            return
        assert self.slots is not None
        assert self.cache is not None
        device = self.policy.device
        first = max([*self.slots.prompts, *(place for place, _ in self.stored.values())], default=-1) + 1
        self.cache.grow_prompts(first + len(prompts), max(map(len, prompts)))
        for pieces in split_prompts([len(prompt) for prompt in prompts], self.prefill_tokens):
            flat = [token for i, piece in pieces for token in prompts[i][piece.start : piece.stop]]
            stops = itertools.accumulate(len(piece) for _, piece in pieces)
            ends = {i: stop - 1 for (i, piece), stop in zip(pieces, stops) if piece.stop == len(prompts[i])}
            plan = Prefill.of(self.cache, [(first + i, piece) for i, piece in pieces], device)
            keep = torch.tensor(list(ends.values()), dtype=torch.long, device=device)
            states = self._states(torch.tensor(flat, device=device), plan.positions, plan, keep)
            self.stored |= {prompts[i]: (first + i, state) for i, state in zip(ends, states, strict=True)}

    def _decode(self) -> None:
        """One further token for every running sample."""
        slots, cache = self.slots, self.cache
        assert slots is not None
        assert cache is not None
        rows = slice(0, self._running)
        drawn = slots.drawn[rows]
        if slots.longest > cache.length:
            cache.grow_slots(0, min(2 * cache.length, slots.tokens.shape[1]))
        slots.seats = slots.seats or Seats(slots.prompts, drawn.device)
        plan = Decode(cache, slots.seats, slots.prompt_lengths[rows], drawn, slots.longest)
        if self._weights is None:
            self._weights = self.policy.for_decoding()
        with decoding(self._weights):
            states = self._states(slots.last[rows], plan.position, plan, plan.rows)
        self._draw(self._logits(states), rows)
        slots.longest += 1

    def _states(self, tokens: Tensor, positions: Tensor, plan: Prefill | Decode, keep: Tensor) -> Tensor:
        return self.policy.states(tokens, positions, plan, keep, keep if isinstance(plan, Prefill) else None)

    def _logits(self, states: Tensor) -> Tensor:
        self._head = self._head or self.policy.head().for_decoding()
        return self._head.logits(states)

    def _forget(self) -> None:
        """What was computed from the weights."""
        self.stored.clear()
        self._head = self._weights = None

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

    def _start_over(self) -> None:
        """Fewer samples side by side: the running ones begin anew. Their random numbers are their own, so they become
        what they were."""
        self.queue.extendleft(reversed(self.slots.owners if self.slots is not None else []))
        self.slots = self.cache = None
        self._forget()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if self.max_rows == 1 and self.prefill_tokens <= _FEW:
            longest = max((request for request, _ in self.queue), key=lambda request: len(request.prompt.tokens))
            raise KlimbError(
                f"{longest.prompt.id}: one sample alone does not fit into the memory",
                why=f"its prompt has {len(longest.prompt.tokens)} tokens and max_tokens is {longest.params.max_tokens}",
                fix="lower max_tokens or max_prompt_tokens, or use a device with more memory",
            )
        self.max_rows = max(1, min(self.max_rows, len(self.queue)) // 2)
        self.refill_at = max(1, self.refill_at // 2)
        self.prefill_tokens = max(_FEW, self.prefill_tokens // 2)
        self.say(f"the rollout does not fit into the memory: from here on {self.max_rows} samples run side by side, "
                 "the result is the same")  # fmt: skip

    # Who comes and who goes -----------------------------------------------------------------------------------------

    def _slots_for(self, new: Sequence[Request]) -> _Slots:
        running = self.slots.owners if self.slots else []
        if len({request.params for request in [*new, *(request for request, _ in running)]}) > 1:
            raise KlimbError("requests that run side by side must share their sampling parameters")
        self.slots = self.slots or _Slots.empty(self.max_rows, new[0].params, self.policy.device)
        return self.slots

    def _take_finished(self) -> Iterator[tuple[Request, Sample]]:
        slots = self.slots
        if slots is None or not slots.owners:
            return
        rows = slice(0, len(slots.owners))
        stopped = (slots.last[rows, None] == slots.stop).any(1)
        full = slots.longest >= slots.tokens.shape[1]
        ended = stopped | (slots.drawn[rows] >= slots.tokens.shape[1]) if full else stopped
        if any(flags := ended.tolist()):  # what a step waits for on a GPU
            reasons: list[Finish] = ["stop" if s else "length" for s in stopped.tolist()]
            yield from self._release([i for i, flag in enumerate(flags) if flag], reasons)

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
        finished = self._samples(leaving, reasons)
        running = len(slots.owners) - len(leaving)
        gone = set(leaving)
        holes = [i for i in leaving if i < running]
        movers = [i for i in range(running, len(slots.owners)) if i not in gone]
        if holes:
            cache.move(movers, holes)
            slots.move(movers, holes)
        del slots.owners[running:], slots.prompts[running:]
        slots.seats = None
        slots.longest = int(slots.drawn[:running].max()) if running else 0
        self._close_prompts()
        yield from finished

    def _close_prompts(self) -> None:
        """Prompts that no sample runs on make place for the last ones in use; that of the next in the queue stays."""
        slots, cache = self.slots, self.cache
        assert slots is not None
        assert cache is not None
        used = set(slots.prompts)
        if self.queue and (following := self.stored.get(tuple(self.queue[0][0].prompt.tokens))):
            used.add(following[0])
        holes = sorted(set(range(len(used))) - used)
        movers = sorted(used)[len(used) - len(holes) :]
        if holes:
            cache.move_prompts(movers, holes)
        now_at = {place: place for place in used} | dict(zip(movers, holes, strict=True))
        slots.prompts = [now_at[place] for place in slots.prompts]
        self.stored = {
            prompt: (now_at[place], state) for prompt, (place, state) in self.stored.items() if place in used
        }

    def _samples(self, leaving: Sequence[int], reasons: Sequence[Finish]) -> list[tuple[Request, Sample]]:
        slots = self.slots
        assert slots is not None
        lines = torch.tensor(leaving, device=slots.tokens.device)
        stores = [store[lines, : slots.longest].tolist() for store in (slots.tokens, slots.logps, slots.versions)]
        finished = []
        for slot, n, *line in zip(leaving, slots.drawn[lines].tolist(), *stores, strict=True):
            request, index = slots.owners[slot]
            tokens, logps, versions = (values[:n] for values in line)
            segment = Segment(tokens, True, logps, versions)
            index = ~index if index < 0 else index
            finished.append((request, Sample(request.prompt.id, index, [segment], reasons[slot], self.view(tokens))))
        return finished


def split_prompts(lengths: Sequence[int], budget: int) -> Iterator[list[tuple[int, range]]]:
    """Prompts → calls of at most `budget` tokens, each of whole prompts or one piece of a longer one.

    Yields index and positions of what a call computes.
    """
    call: list[tuple[int, range]] = []
    free = budget
    for i, length in enumerate(lengths):
        for start in range(0, length, budget):
            piece = range(start, min(start + budget, length))
            if len(piece) > free:
                yield call
                call, free = [], budget
            call.append((i, piece))
            free -= len(piece)
    if call:
        yield call
