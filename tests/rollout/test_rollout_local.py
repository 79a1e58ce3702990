"""The in-process engine: what it samples, and that it is the trainer's own distribution."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from families import VOCABULARY, ragged, tiny
from torch import Tensor

from klimb import native
from klimb.batch import TokenBatch, pad_tokens, sample_rows
from klimb.errors import KlimbError
from klimb.models.backbone import Backbone
from klimb.models.cache import Decode, Prefill
from klimb.models.faces import Policy, policy_logps
from klimb.rollout import local
from klimb.rollout.engine import Request, finished_groups, generate
from klimb.rollout.fake import FakeEngine
from klimb.rollout.local import LocalEngine, split_prompts
from klimb.rollout.sampling import SamplingParams, draw, stream_key, uniforms
from klimb.types import Group, Prompt

pytestmark = pytest.mark.usefixtures("kernels")
STOP = frozenset(range(8))


def prompts(n: int = 6, seed: int = 0) -> list[Prompt]:
    chosen = random.Random(seed)
    return [
        Prompt(f"p{i}", [chosen.randrange(8, VOCABULARY) for _ in range(chosen.randint(1, 9))], "?") for i in range(n)
    ]


def engine(family: str = "llama", max_rows: int = 64, seed: int = 0) -> LocalEngine:
    return LocalEngine(Policy(Backbone(tiny(family, seed)), None), lambda tokens: str(tokens), max_rows=max_rows)


def requests(params: SamplingParams, samples: int = 4, n: int = 6) -> list[Request]:
    return [Request(prompt, samples, params, seed=7) for prompt in prompts(n)]


def as_batch(groups: Sequence[Group]) -> TokenBatch:
    pairs = [(i, group, sample) for i, group in enumerate(groups) for sample in group.samples]
    rows = [sample_rows(group.prompt.tokens, sample) for _, group, sample in pairs]
    batch = TokenBatch.from_rows(rows, [i for i, _, _ in pairs], [s.id for _, _, s in pairs])
    return batch.with_columns(behavior=pad_tokens([s.logps for _, _, s in pairs], batch.mask))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral-window", "gemma2", "gemma3", "gpt2"])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
def test_log_probs_stored_at_sampling_are_the_trainers(family: str, temperature: float) -> None:
    generator = engine(family)
    groups = generate(generator, requests(SamplingParams(24, STOP, temperature)))
    batch = as_batch(groups)
    logps = policy_logps(generator.policy, batch, budget=10_000, temperature=temperature).logps
    gap = (logps - batch["behavior"])[batch.mask].abs()
    assert torch.quantile(gap, 0.99) <= 2e-5 / temperature  # logits carry the fp32 error, temperature scales it


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_in_bfloat16_they_are_near(family: str) -> None:
    """Two orders of the same sums differ by some of the 8 bits; logits of a like spread as those of real models."""
    model = tiny(family)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.div_(4)
    generator = LocalEngine(Policy(Backbone(model.to(torch.bfloat16)), None), str, max_rows=7)
    batch = as_batch(generate(generator, requests(SamplingParams(24, STOP))))
    logps = policy_logps(generator.policy, batch, budget=10_000).logps
    assert (logps - batch["behavior"])[batch.mask].abs().mean() <= 5e-3


def test_the_same_batch_history_gives_the_same_bits() -> None:
    params = SamplingParams(24, STOP)
    first, second = (generate(engine(max_rows=5), requests(params)) for _ in range(2))
    assert first == second


@pytest.mark.parametrize("rows", [1, 3, 7])
def test_another_batch_history_differs_only_at_an_edge_of_the_cdf(rows: int) -> None:
    """At the first divergence the draw lies within the log-prob error of a border between two tokens."""
    params = SamplingParams(24, STOP)
    one, other = engine(max_rows=64), engine(max_rows=rows)
    for a, b in zip(generate(one, requests(params)), generate(other, requests(params)), strict=True):
        for x, y in zip(a.samples, b.samples, strict=True):
            if x.tokens == y.tokens:
                assert torch.allclose(torch.tensor(x.logps), torch.tensor(y.logps), atol=2e-5)
                continue
            place = next(i for i, (s, t) in enumerate(zip(x.tokens, y.tokens, strict=False)) if s != t)
            context = torch.tensor([[*a.prompt.tokens, *x.tokens[:place]]])
            one.policy.backbone.model.set_attn_implementation("eager")
            cdf = one.policy.backbone.model(input_ids=context).logits[0, -1].double().softmax(-1).cumsum(-1)
            one.policy.backbone.model.set_attn_implementation("klimb")
            u = float(uniforms([stream_key(7, a.prompt.id, x.index)], place + 1)[0, place])
            assert (cdf - u).abs().min() < 1e-5


def test_tokens_stop_where_they_should() -> None:
    groups = generate(engine(), requests(SamplingParams(12, STOP)))
    finishes = set()
    for sample in (s for g in groups for s in g.samples):
        tokens = sample.tokens
        finishes.add(sample.finish)
        assert len(tokens) <= 12
        assert all(token not in STOP for token in tokens[:-1])
        assert (tokens[-1] in STOP) == (sample.finish == "stop")
        assert sample.finish == "stop" or len(tokens) == 12
    assert finishes == {"stop", "length"}


def test_groups_come_in_the_order_of_the_requests_with_all_samples() -> None:
    asked = requests(SamplingParams(24, STOP), samples=5)
    groups = generate(engine(max_rows=4), asked)
    assert [g.prompt.id for g in groups] == [r.prompt.id for r in asked]
    assert all([s.index for s in g.samples] == list(range(5)) for g in groups)


@pytest.mark.parametrize("vocabulary", [50, 128, 200])
def test_sampling_follows_the_distribution(vocabulary: int) -> None:
    """χ² of 100,000 draws against softmax(logits / T), cells of at least 20 expected; one block and several."""
    torch.manual_seed(0)
    logits, temperature, n = torch.randn(1, vocabulary) * 2, 0.8, 100_000
    u = uniforms([stream_key(3, "p", i) for i in range(n // 100)], 100).reshape(-1)
    tokens, logps = draw(logits.expand(n, -1), u, SamplingParams(1, frozenset(), temperature))
    expected = (logits[0].double() / temperature).softmax(-1) * n
    counts = torch.bincount(tokens, minlength=vocabulary).double()
    big = expected >= 20
    chi2 = float(((counts - expected)[big] ** 2 / expected[big]).sum())
    freedom = int(big.sum()) - 1
    assert chi2 < freedom + 4.5 * math.sqrt(2 * freedom)  # about p = 1e-5
    assert torch.allclose(logps, (logits / temperature).log_softmax(-1)[0, tokens], atol=1e-6)


def test_uniforms_are_uniform_and_independent_of_who_else_is_asked() -> None:
    keys = [stream_key(0, "prompt", i) for i in range(500)]
    numbers = uniforms(keys, 200)
    assert float(numbers.min()) >= 0
    assert float(numbers.max()) < 1
    counts = torch.histc(numbers.float(), 64, 0, 1)
    expected = numbers.numel() / 64
    assert float(((counts - expected) ** 2 / expected).sum()) < 63 + 4.5 * math.sqrt(126)
    neighbours = torch.corrcoef(torch.stack([numbers[:, :-1].reshape(-1), numbers[:, 1:].reshape(-1)]))[0, 1]
    assert abs(float(neighbours)) < 4.5 / math.sqrt(numbers.numel())
    assert torch.equal(uniforms(keys[3:4], 50)[0], numbers[3, :50])


def test_no_draw_takes_a_token_of_probability_zero() -> None:
    logits = torch.full((4, 6), -torch.inf)
    logits[:, 2], logits[:, 4] = 0.0, 1.0
    u = torch.tensor([0.0, 0.2689, 0.2690, 1 - 2**-53], dtype=torch.float64)
    tokens, _ = draw(logits, u, SamplingParams(1, frozenset()))
    assert tokens.tolist() == [2, 2, 4, 4]  # σ(−1) = 0.26894


def test_a_draw_is_that_of_the_running_sum_of_the_whole_vocabulary() -> None:
    """Also where whole blocks have no weight, and for u next to 0 and 1."""
    torch.manual_seed(0)
    logits = torch.randn(2000, 300) * 2
    logits[:, 60:200] = logits[:, 290:] = -torch.inf
    u = torch.rand(2000, dtype=torch.float64)
    u[:2] = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    cdf = logits.double().softmax(-1).cumsum(-1)
    tokens, _ = draw(logits, u, SamplingParams(1, frozenset()))
    expected = torch.searchsorted(cdf, u[:, None], right=True).squeeze(1).clamp(max=289)
    at_an_edge = (cdf - u[:, None]).abs().amin(-1) < 1e-6  # the exponentials and a block's sum are in fp32
    assert torch.equal(tokens[~at_an_edge], expected[~at_an_edge])
    assert logits.gather(1, tokens[:, None]).isfinite().all()
    assert at_an_edge.sum() < 20


def test_restricted_sampling() -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]]).expand(1000, -1)
    u = torch.linspace(0, 0.999, 1000, dtype=torch.float64)
    assert set(draw(logits, u, SamplingParams(1, frozenset(), top_k=2))[0].tolist()) == {0, 1}
    assert set(draw(logits, u, SamplingParams(1, frozenset(), top_p=0.6))[0].tolist()) == {0}  # p(0) = .644
    assert set(draw(logits, u, SamplingParams(1, frozenset(), temperature=0))[0].tolist()) == {0}
    seen = torch.tensor([[True, False, False, False]]).expand(1000, -1)
    penalised = SamplingParams(1, frozenset(), temperature=0, repetition_penalty=2.0)
    assert set(draw(logits, u, penalised, seen)[0].tolist()) == {1}


def test_a_prompt_beyond_the_context_is_refused_before_anything_runs() -> None:
    generator = engine()
    long = Prompt("long", [9] * generator.policy.backbone.context, "?")
    with pytest.raises(KlimbError, match="context"):
        generator.submit([Request(long, 1, SamplingParams(4, STOP), 0)])


def test_abort_pause_and_versions() -> None:
    generator = engine(max_rows=3)
    asked = requests(SamplingParams(24, frozenset()), samples=2, n=3)
    generator.update_weights(4)
    generator.submit(asked)
    stream = generator.stream()
    _, first = next(stream)
    assert first.segments[0].versions == [4] * 24
    generator.pause()
    until_paused = [sample for _, sample in stream]
    assert len(until_paused) < 5
    generator.resume()
    generator.update_weights(5)
    generator.abort()
    rest = [sample for _, sample in generator.stream()]
    assert any(sample.finish == "abort" for sample in rest)
    assert sorted(s.id for s in [first, *until_paused, *rest]) == [f"p{i}/{j}" for i in range(3) for j in range(2)]


def test_mixed_versions_are_recorded_token_by_token() -> None:
    generator = engine(max_rows=2)
    generator.update_weights(1)
    generator.submit(requests(SamplingParams(30, STOP), samples=2, n=2))
    stream = generator.stream()
    next(stream)
    generator.update_weights(2)
    versions = [v for _, s in stream for segment in s.segments for v in segment.versions]
    assert set(versions) == {1, 2}


def test_new_weights_are_drawn_from_at_once_though_the_head_was_made_ready() -> None:
    """In 16 bits it is a copy."""
    generator = LocalEngine(Policy(Backbone(tiny("llama", dtype=torch.bfloat16)), None), str, max_rows=1)
    params = SamplingParams(30, frozenset())
    generator.submit(requests(params, samples=1, n=2))
    stream = generator.stream()
    next(stream)
    head = generator.policy.head()
    assert head.weight is not None
    with torch.no_grad():
        head.weight.zero_()
    generator.update_weights(2)
    ((_, second),) = stream
    assert second.logps == pytest.approx([-math.log(VOCABULARY)] * 30, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("family", "products"), [("gemma2", 15), ("gpt2", 9)])
def test_tokens_are_multiplied_by_panels_until_the_rollout_ends(
    family: str, products: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seven products in each of two layers (GPT-2: four) and the head's, laid out once a rollout, though samples start
    twice; without the kernels none. Layers of neither family are computed in one call."""
    policy = Policy(Backbone(tiny(family, dtype=dtype)), None)
    laid_out: list[native.Panels] = []
    read: list[native.Panels] = []
    panels, product = native.panels, native.product

    def lay_out(weight: Tensor) -> native.Panels:
        laid_out.append(panels(weight))
        return laid_out[-1]

    def multiply(x: Tensor, weight: native.Panels, bias: Tensor | None) -> Tensor:
        read.append(weight)
        return product(x, weight, bias)

    monkeypatch.setattr(native, "panels", lay_out)
    monkeypatch.setattr(native, "product", multiply)
    generator = LocalEngine(policy, str, max_rows=2)
    [_] = generate(generator, requests(SamplingParams(9, frozenset()), samples=4, n=1))
    kernels = native.takes(torch.zeros(1))
    assert len(laid_out) == kernels * products
    assert len(read) == kernels * 2 * (8 * products + 1)  # a sample's first token is drawn from the prompt's last state
    assert generator._weights is None
    assert generator._head is None


def test_weights_too_large_to_be_held_twice_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_MOST", 1000)
    monkeypatch.setattr(native, "product", lambda *_: pytest.fail("by panels"))
    generator = engine()
    [group] = generate(generator, requests(SamplingParams(9, frozenset()), samples=2, n=1))
    logps = policy_logps(generator.policy, as_batch([group]), budget=10_000).logps
    assert torch.allclose(logps.flatten(), as_batch([group])["behavior"].flatten(), atol=2e-5)


def test_whoever_stops_asking_leaves_no_weights_behind() -> None:
    generator = engine(max_rows=1)
    generator.submit(requests(SamplingParams(9, frozenset()), samples=3, n=2))
    stream = generator.stream()
    next(stream)
    assert generator._weights is not None
    stream.close()
    assert generator._weights is None
    assert generator._head is None
    assert len(list(generator.stream())) == 5


def test_a_late_unordered_aborting_engine_still_gives_whole_groups() -> None:
    asked = requests(SamplingParams(8, STOP), samples=4, n=5)
    fake = FakeEngine(seed=3, abort_share=0.2)
    fake.submit(asked)
    groups = dict((request.prompt.id, group) for request, group in finished_groups(fake.stream()))
    assert set(groups) == {request.prompt.id for request in asked}
    for group in groups.values():
        assert [s.index for s in group.samples] == sorted(s.index for s in group.samples)
        assert all(s.finish != "abort" for s in group.samples)
    assert sum(len(g.samples) for g in groups.values()) < 20


def test_the_cache_is_allocated_once_and_given_back() -> None:
    """One set of tensors as long as something runs, also when samples leave and others come; none between rollouts."""
    generator = engine(max_rows=24)
    generator.submit(requests(SamplingParams(24, STOP), samples=8))
    stores = set()
    for _ in generator.stream():
        if generator.cache is not None and generator.cache.layers:
            stores.add(tuple(store.data_ptr() for layer in generator.cache.layers.values() for store in layer[2:]))
    assert len(stores) == 1
    assert generator.cache is None


def test_a_prompt_is_stored_once_for_all_its_samples() -> None:
    generator = engine(max_rows=12)
    generator.submit(requests(SamplingParams(24, STOP), samples=4, n=3))
    next(generator.stream())
    assert generator.cache is not None
    assert generator.cache.prompts == 3


def prefilled(generator: LocalEngine) -> list[int]:
    """Grows by the number of flat tokens of every prefill call."""
    counts: list[int] = []

    def count(module: torch.nn.Module, given: object, named: dict[str, Any]) -> None:
        if isinstance(named["attention_plan"], Prefill):
            counts.append(named["input_ids"].shape[1])

    generator.policy.backbone.model.base_model.register_forward_pre_hook(count, with_kwargs=True)
    return counts


@pytest.mark.parametrize("rows", [3, 64])
def test_a_prompt_is_computed_once_whoever_asks_for_it_and_whenever(rows: int) -> None:
    """Groups larger than the free slots are started in parts, and the same prompts are asked for a second time."""
    generator = engine(max_rows=rows)
    counts = prefilled(generator)
    once = requests(SamplingParams(24, STOP), samples=5)
    again = [replace(request, first=5) for request in once]
    groups = generate(generator, [*once, *again])
    assert sum(counts) == sum(len(request.prompt.tokens) for request in once)
    assert [s.index for s in groups[-1].samples] == list(range(5, 10))
    whole = generate(engine(), [replace(request, samples=10) for request in once])
    assert [s.tokens for g in whole for s in g.samples[:5]] == [s.tokens for g in groups[:6] for s in g.samples]
    assert [s.tokens for g in whole for s in g.samples[5:]] == [s.tokens for g in groups[6:] for s in g.samples]


def assert_equal_beyond_rounding(one: Sequence[Group], other: Sequence[Group]) -> None:
    for x, y in zip((s for g in one for s in g.samples), (s for g in other for s in g.samples), strict=True):
        assert x.tokens == y.tokens
        assert torch.allclose(torch.tensor(x.logps), torch.tensor(y.logps), atol=2e-5)


@pytest.mark.parametrize("family", ["llama", "mistral-window", "gemma2", "gpt2"])
@pytest.mark.parametrize("tokens", [1, 4, 7, 16])
def test_prompts_in_pieces_are_the_same_prompts(family: str, tokens: int) -> None:
    """Prompts of 1 to 9 tokens share calls, or not. Draws are greedy, so that rounding cannot tell samples apart."""
    params = SamplingParams(24, STOP, temperature=0)
    whole, pieces = engine(family), engine(family)
    pieces.prefill_tokens = tokens
    counts = prefilled(pieces)
    one, other = generate(whole, requests(params)), generate(pieces, requests(params))
    assert max(counts) <= tokens
    assert sum(counts) == sum(len(prompt.tokens) for prompt in prompts())
    assert_equal_beyond_rounding(one, other)
    batch = as_batch(other)
    logps = policy_logps(pieces.policy, batch, budget=10_000).logps
    assert torch.allclose(logps[batch.mask], batch["behavior"][batch.mask], atol=2e-5)


def test_a_call_takes_prompts_up_to_the_budget_and_pieces_of_longer_ones() -> None:
    calls = list(split_prompts([3, 4, 2, 10, 1, 5], 5))
    assert calls == [
        [(0, range(3))], [(1, range(4))], [(2, range(2))], [(3, range(5))], [(3, range(5, 10))], [(4, range(1))],
        [(5, range(5))],
    ]  # fmt: skip
    assert list(split_prompts([3, 4, 2], 9)) == [[(0, range(3)), (1, range(4)), (2, range(2))]]
    assert list(split_prompts([7, 3], 4)) == [[(0, range(4))], [(0, range(4, 7))], [(1, range(3))]]
    assert list(split_prompts([6, 2], 4)) == [[(0, range(4))], [(0, range(4, 6)), (1, range(2))]]


def test_the_cache_grows_with_the_samples_and_not_with_what_they_might_become() -> None:
    """200 tokens are allowed; room for 4 samples and 128 tokens is made, then for all 200 when one gets so far."""
    short = engine()
    short.submit([Request(prompts(1)[0], 4, SamplingParams(200, STOP), seed=7)])
    long = engine()
    long.submit([Request(prompts(1)[0], 4, SamplingParams(200, frozenset()), seed=7)])
    sizes = {}
    for name, generator in (("short", short), ("long", long)):
        for _, sample in generator.stream():
            assert (len(sample.tokens) <= 128) == (name == "short")
            if generator.cache is not None:
                sizes[name] = generator.cache.slots, generator.cache.length
    assert sizes == {"short": (4, 128), "long": (4, 200)}


@pytest.mark.parametrize("rows", [3, 64])
def test_a_growing_cache_changes_nothing(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for 2 tokens at first, against room for all at once."""
    params = SamplingParams(24, STOP, temperature=0)
    whole = generate(engine(max_rows=rows), requests(params))
    monkeypatch.setattr(local, "_LENGTH", 2)
    assert_equal_beyond_rounding(generate(engine(max_rows=rows), requests(params)), whole)


def test_no_place_is_kept_for_prompts_that_come_again_much_later() -> None:
    generator = engine(max_rows=2)
    once = requests(SamplingParams(24, STOP), samples=2)
    generator.submit([*once, *once])
    places = [generator.cache.prompts for _ in generator.stream() if generator.cache is not None]
    assert max(places) <= 3


def test_new_weights_compute_their_prompts_anew() -> None:
    """A group is started in two parts, and the weights change between them."""
    generator = engine(max_rows=2)
    generator.submit([Request(prompts(1)[0], 6, SamplingParams(24, STOP), seed=7)])
    stream = generator.stream()
    first = [next(stream)[1]]
    with torch.no_grad():
        for parameter in generator.policy.parameters():
            parameter.mul_(1.5)
    generator.update_weights(1)
    samples = [sample for _, sample in stream]
    new = [sample for sample in samples if set(sample.segments[0].versions) == {1}]
    assert len(new) >= 3
    assert first[0].segments[0].versions[0] == 0
    batch = as_batch([Group(prompts(1)[0], new)])
    logps = policy_logps(generator.policy, batch, budget=10_000).logps
    assert torch.allclose(logps[batch.mask], batch["behavior"][batch.mask], atol=2e-5)


def test_sampling_equals_transformers_greedy() -> None:
    generator = engine("gemma2")
    [group] = generate(generator, [Request(prompts(1)[0], 1, SamplingParams(16, STOP, temperature=0), 0)])
    model = generator.policy.backbone.model
    model.set_attn_implementation("eager")
    tokens = list(group.prompt.tokens)
    for token in group.samples[0].tokens:
        assert int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()) == token
        tokens.append(token)
    assert ragged is not None


# Too little memory ----------------------------------------------------------------------------------------------------


def with_room_for(rows: int, one: LocalEngine, where: type) -> list[int]:
    """An engine whose device holds as many tokens of a call as `rows`; what calls were tried."""
    real, tried = one._states, list[int]()

    def states(tokens: Tensor, positions: Tensor, plan: Any, keep: Tensor) -> Tensor:
        if isinstance(plan, where):
            tried.append(len(tokens))
            if len(tokens) > rows:
                torch.empty(1 << 60, dtype=torch.uint8)  # the error of a CPU
        return real(tokens, positions, plan, keep)

    one._states = states  # type: ignore[method-assign]
    return tried


@pytest.mark.parametrize(("where", "rows"), [(Decode, 1), (Decode, 5), (Prefill, 9), (Prefill, 20)])
def test_a_rollout_that_does_not_fit_runs_fewer_samples_side_by_side(where: type, rows: int) -> None:
    params, said = SamplingParams(24, STOP), list[str]()
    one, other = engine(max_rows=24), engine(max_rows=24)
    one.say = said.append
    tried = with_room_for(rows, one, where)
    for a, b in zip(generate(one, requests(params)), generate(other, requests(params)), strict=True):
        assert [x.tokens for x in a.samples] == [x.tokens for x in b.samples]
        for x, y in zip(a.samples, b.samples, strict=True):
            assert torch.allclose(torch.tensor(x.logps), torch.tensor(y.logps), atol=2e-5)  # another order of sums
    assert max(tried) > rows >= min(tried)
    assert said != []
    assert all(line.startswith("the rollout does not fit into the memory: from here on ") for line in said)
    refused = len([count for count in tried if count > rows])
    assert refused == len(said) < 6  # it does not run into the wall again and again


def test_one_sample_that_does_not_fit_is_an_error_that_names_it() -> None:
    one = engine()
    with_room_for(0, one, Decode)
    longest = max(prompts(), key=lambda prompt: len(prompt.tokens))
    with pytest.raises(KlimbError, match=f"^{longest.id}: one sample alone does not fit .*max_tokens is 24; lower max"):
        generate(one, requests(SamplingParams(24, STOP)))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_no_numbers_are_refused(value: float, temperature: float) -> None:
    logits = torch.zeros(2, 4)
    logits[1, 2] = value
    with pytest.raises(KlimbError, match="NaN or infinite"):
        draw(logits, torch.full((2,), 0.5, dtype=torch.float64), SamplingParams(1, STOP, temperature))
