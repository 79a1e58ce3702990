"""Each kernel against a plain formula in float64, at shapes that do not fit a vector."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from klimb import native
from klimb.models.attention import PackedAttention
from klimb.models.cache import Decode, KVCache, Seats

pytestmark = pytest.mark.skipif(native.why_not() is not None, reason=f"no kernels: {native.why_not()}")

# Sums of up to a few hundred products in float32: 1e-6 of the largest number is some ten units in the last place. What
# leaves in bfloat16 is rounded once, to 8 bits, and by nothing else.
CLOSE = {torch.float32: 3e-6, torch.bfloat16: 2**-8 + 3e-6}
DTYPES = pytest.mark.parametrize("dtype", CLOSE, ids=str)
CPU = torch.device("cpu")
Span = tuple[range, range]


@pytest.fixture(autouse=True)
def native_on() -> Iterator[None]:
    native.use(True)
    yield
    native.use(True)


def error(ours: Tensor, exact: Tensor) -> float:
    return float((ours.detach().double() - exact.detach()).abs().max() / exact.abs().max().clamp(min=1.0))


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def exact_attention(q: Tensor, k: Tensor, v: Tensor, spans: list[Span], scale: float, window: int | None) -> Tensor:
    """Query by query, from the definition: q [1, H, N, D], k, v [1, H_kv, N, D] → [1, N, H, D]."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1)[0], v.repeat_interleave(groups, 1)[0]
    rows: list[Tensor] = [q.new_zeros(0)] * q.shape[2]
    for queries, context in spans:
        for i, token in enumerate(queries):
            seen = [*context, *queries[: i + 1]][-window if window else None :]
            weights = (torch.einsum("hd,hjd->hj", q[0, :, token], k[:, seen]) * scale).softmax(-1)
            rows[token] = torch.einsum("hj,hjd->hd", weights, v[:, seen])
    return torch.stack(rows)[None]


@st.composite
def trees(draw: st.DrawFn) -> list[Span]:
    """Prompts with their completions, as packing lays them out, and sequences for themselves."""
    spans: list[Span] = []
    end = 0
    for _ in range(draw(st.integers(1, 3))):
        prompt = range(end, end := end + draw(st.integers(1, 40)))
        spans.append((prompt, range(0)))
        for _ in range(draw(st.integers(0, 3))):
            spans.append((range(end, end := end + draw(st.integers(1, 40))), prompt))
    return spans


@settings(deadline=None, max_examples=25)
@given(
    trees(),
    st.sampled_from([(4, 4), (4, 2), (3, 1)]),
    st.sampled_from([6, 16, 20, 32, 64, 80]),
    st.sampled_from([None, 1, 7, 33]),
    st.sampled_from([*CLOSE]),
)
def test_attention_and_its_gradient_are_those_of_the_definition(
    spans: list[Span], heads: tuple[int, int], width: int, window: int | None, dtype: torch.dtype
) -> None:
    tokens = spans[-1][0].stop
    q, k, v = (
        numbers(1, tokens, h, width, seed=i, dtype=dtype).transpose(1, 2)
        for i, h in enumerate((heads[0], heads[1], heads[1]))
    )
    grad = numbers(1, tokens, heads[0], width, seed=9, dtype=dtype)
    ours, exact = ([x.to(kind).requires_grad_() for x in (q, k, v)] for kind in (dtype, torch.float64))
    plan = PackedAttention(spans, CPU)
    assert plan.trees is not None  # else torch's path would be held against the definition
    out = plan.attend(0, *ours, width**-0.5, window, None)
    definition = exact_attention(*exact, spans, width**-0.5, window)
    assert error(out, definition) < CLOSE[dtype]
    pairs = zip(
        torch.autograd.grad(out, ours, grad), torch.autograd.grad(definition, exact, grad.double()), strict=True
    )
    assert max(error(*pair) for pair in pairs) < CLOSE[dtype]


@pytest.mark.parametrize("grad", [True, False])
def test_large_scores_neither_overflow_nor_vanish(grad: bool) -> None:
    q, k, v = (50 * numbers(1, 40, 2, 16, seed=i).transpose(1, 2) for i in range(3))
    spans = [(range(40), range(0))]
    with torch.set_grad_enabled(grad):
        out = PackedAttention(spans, CPU).attend(0, *(x.requires_grad_(grad) for x in (q, k, v)), 1.0, None, None)
    # Scores of some 40,000 carry 0.004 of rounding each.
    assert error(out.detach(), exact_attention(q.double(), k.double(), v.double(), spans, 1.0, None).detach()) < 0.02


def test_a_number_that_is_none_stays_visible() -> None:
    q, k, v = (numbers(1, 20, 2, 16, seed=i).transpose(1, 2) for i in range(3))
    q[0, 1, 5, 3] = torch.nan
    out = PackedAttention([(range(20), range(0))], CPU).attend(0, q, k, v, 0.25, None, None)
    wrong = out.isnan().any(-1)[0]
    assert wrong[5, 1]
    assert int(wrong.sum()) == 1


@pytest.mark.parametrize(
    "spans",
    [
        [(range(5), range(5, 9))],
        [(range(3), range(0)), (range(3, 6), range(0)), (range(6, 9), range(3))],
        [(range(3, 6), range(0)), (range(3), range(0))],
    ],
    ids=["context behind the run", "context in another sequence", "out of order"],
)
def test_spans_that_are_no_trees_go_the_other_way(spans: list[Span]) -> None:
    plan = PackedAttention(spans, CPU)
    assert plan.trees is None
    keys = max(max(queries.stop, context.stop) for queries, context in spans)
    q, k, v = (numbers(1, 2, n, 8, seed=i) for i, n in enumerate((max(q.stop for q, _ in spans), keys, keys)))
    out = plan.attend(0, q, k, v, 0.5, None, None)
    assert error(out, exact_attention(q.double(), k.double(), v.double(), spans, 0.5, None)) < CLOSE[torch.float32]


@pytest.mark.parametrize("threads", [1, 2])
def test_the_number_of_threads_changes_no_attention(threads: int) -> None:
    q, k, v = (numbers(1, 90, 4, 32, seed=i).transpose(1, 2).requires_grad_() for i in range(3))
    spans = [(range(30), range(0)), (range(30, 60), range(30)), (range(60, 90), range(0))]

    def results() -> list[Tensor]:
        out = PackedAttention(spans, CPU).attend(0, q, k, v, 0.2, None, None)
        return [out, *torch.autograd.grad(out.square().sum(), (q, k, v))]

    before = torch.get_num_threads()
    one = results()
    torch.set_num_threads(threads)
    try:
        assert all(torch.equal(a, b) for a, b in zip(one, results(), strict=True))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("window", [None, 5, 40])
@pytest.mark.parametrize(("heads", "kv", "width"), [(4, 4, 32), (4, 2, 20), (6, 2, 64), (3, 1, 6)])
@DTYPES
def test_a_decode_step_is_that_of_torch_and_stores_the_same(
    heads: int, kv: int, width: int, window: int | None, dtype: torch.dtype
) -> None:
    lengths, prompt_of, drawn = [17, 40, 1], [0, 2, 1, 0, 1], [1, 9, 33, 60, 2]
    results = []
    for on in (True, False):
        native.use(on)
        cache = KVCache()
        cache.grow_prompts(3, 40)
        cache.grow_slots(5, 64)
        stored = cache.layer(0, *[numbers(1, kv, 1, width, dtype=dtype)] * 2)
        for i, store in enumerate(stored):
            store.copy_(numbers(*store.shape, seed=i))
        q, k, v = (numbers(1, 5, h, width, seed=i, dtype=dtype).transpose(1, 2) for i, h in enumerate((heads, kv, kv)))
        prompt_lengths = torch.tensor([lengths[p] for p in prompt_of])
        plan = Decode(cache, Seats(prompt_of, CPU), prompt_lengths, torch.tensor(drawn), max(drawn))
        results.append((plan.attend(0, q, k, v, width**-0.5, window, None), *stored))
    native.use(True)
    ours, theirs = results
    assert error(ours[0], theirs[0].double()) < 2 * CLOSE[dtype]  # both are rounded
    assert all(torch.equal(a, b) for a, b in zip(ours[1:], theirs[1:], strict=True))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("rows", "width"), [(1, 5), (7, 128), (900, 48)])
@DTYPES
def test_rms_norm(rows: int, width: int, threads: int, dtype: torch.dtype) -> None:
    x, weight, grad = (
        numbers(*shape, seed=i, dtype=dtype) for i, shape in enumerate(((rows, width), (width,), (rows, width)))
    )
    exact = [t.double().requires_grad_() for t in (x, weight)]
    definition = exact[0] / (exact[0].square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1.0 + exact[1])
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        y, scale = native.rms_norm_forward(x, weight, 1.0, 1e-6)
        gradients = native.rms_norm_backward(x, weight, 1.0, scale, grad)
    finally:
        torch.set_num_threads(before)
    assert error(y, definition) < CLOSE[dtype]
    for ours, theirs in zip(gradients, torch.autograd.grad(definition, exact, grad.double()), strict=True):
        assert error(ours, theirs) < CLOSE[dtype]


@DTYPES
def test_swiglu_from_end_to_end_of_float32(dtype: torch.dtype) -> None:
    gate = torch.cat([torch.linspace(-200, 200, 4001), torch.linspace(-1, 1, 401)]).to(dtype)
    up, grad = numbers(len(gate), dtype=dtype), numbers(len(gate), seed=1, dtype=dtype)
    exact = [t.double().requires_grad_() for t in (gate, up)]
    definition = torch.nn.functional.silu(exact[0]) * exact[1]
    assert error(native.swiglu_forward(gate, up), definition) < CLOSE[dtype]
    ours = native.swiglu_backward(gate, up, grad)
    for one, theirs in zip(ours, torch.autograd.grad(definition, exact, grad.double()), strict=True):
        assert error(one, theirs) < CLOSE[dtype]


@pytest.mark.parametrize("width", [2, 6, 32, 80])
@DTYPES
def test_rotary_positions_and_their_transposed_map(width: int, dtype: torch.dtype) -> None:
    x, grad = numbers(3, 11, width, dtype=dtype), numbers(3, 11, width, seed=1, dtype=dtype)
    angle = numbers(11, width)  # another angle in each half is allowed, some families interpolate
    cosine, sine = angle.cos().to(dtype), angle.sin().to(dtype)
    exact = x.double().requires_grad_()
    half = width // 2
    turned = torch.cat([-exact[..., half:], exact[..., :half]], -1)
    definition = exact * cosine.double() + turned * sine.double()
    assert error(native.rope(x, cosine, sine), definition) < CLOSE[dtype]
    (theirs,) = torch.autograd.grad(definition, exact, grad.double())
    assert error(native.rope(grad, cosine, sine, inverse=True), theirs) < CLOSE[dtype]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize(
    ("rows", "vocabulary", "spread"), [(1, 1, 1.0), (5, 37, 20.0), (3, 40_000, 3.0), (17, 1024, 0.0)]
)
def test_log_probs_of_chosen_tokens_and_their_gradient(
    rows: int, vocabulary: int, spread: float, entropy: bool, threads: int
) -> None:
    logits, targets = spread * numbers(rows, vocabulary), torch.arange(rows) * 7 % vocabulary
    grads, entropy_grads = numbers(rows, seed=1), numbers(rows, seed=2)
    entropy_grads[0] = 0.0
    exact = logits.double().requires_grad_()
    log_p = (exact / 0.7).log_softmax(-1)
    logps, entropies = log_p.gather(1, targets[:, None]).squeeze(1), -(log_p.exp() * log_p).sum(-1)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        ours, normalisers, found = native.token_logps_forward(logits, targets, 0.7, entropy)
        gradient = native.token_logps_backward_(
            logits.clone(), targets, 0.7, normalisers, normalisers if found is None else found, grads,
            entropy_grads if entropy else None,
        )  # fmt: skip
    finally:
        torch.set_num_threads(before)
    assert error(ours, logps) < CLOSE[torch.float32]
    assert error(normalisers, (exact / 0.7).logsumexp(-1)) < CLOSE[torch.float32]
    total = (logps * grads).sum()
    if entropy:
        assert found is not None
        assert error(found, entropies) < CLOSE[torch.float32]
        total = total + (entropies * entropy_grads).sum()
    assert error(gradient, torch.autograd.grad(total, exact)[0]) < CLOSE[torch.float32]


def test_logits_that_are_far_apart_or_none() -> None:
    logits = torch.tensor([[1e4, 0.0, -1e4], [-3e38, 3e38, 0.0], [0.0, torch.nan, 0.0]])
    logps, _, entropies = native.token_logps_forward(logits, torch.tensor([1, 1, 0]), 1.0, True)
    assert logps[:2].tolist() == [-1e4, 0.0]
    assert entropies is not None
    assert entropies[:2].abs().max() < 1e-30
    assert logps[2].isnan()
    assert entropies[2].isnan()


@pytest.mark.parametrize("target", [-1, 3])
def test_a_target_that_no_logit_belongs_to(target: int) -> None:
    with pytest.raises(IndexError, match=r"targets from (-1 to 0|0 to 3) of 3 tokens"):
        native.token_logps_forward(numbers(2, 3), torch.tensor([0, target]), 1.0, False)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 40), st.integers(1, 90), st.integers(1, 130), st.booleans(), st.booleans(), st.integers(1, 3),
    st.sampled_from([*CLOSE]),
)  # fmt: skip
def test_a_product_by_panels(
    rows: int, inputs: int, outputs: int, by_column: bool, bias: bool, threads: int, dtype: torch.dtype
) -> None:
    x, weight = numbers(rows, inputs, dtype=dtype), numbers(outputs, inputs, dtype=dtype, seed=1)
    shift = numbers(outputs, dtype=dtype, seed=2) if bias else None
    weight = weight.t().contiguous().t() if by_column else weight
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        found = native.product(x[None], native.panels(weight), shift)
    finally:
        torch.set_num_threads(before)
    exact = x.double() @ weight.double().T + (0.0 if shift is None else shift.double())
    assert found.shape == (1, rows, outputs)
    assert found.dtype == dtype
    assert error(found[0], exact) <= CLOSE[dtype]


@DTYPES
def test_a_row_of_a_product_is_what_it_is_alone(dtype: torch.dtype) -> None:
    """So a sample's numbers do not depend on who else is running, nor on threads."""
    x, weight = numbers(37, 65, dtype=dtype), native.panels(numbers(200, 65, dtype=dtype, seed=1))
    together = native.product(x, weight, None)
    assert all(torch.equal(together[i], native.product(x[i], weight, None)) for i in range(37))
    torch.set_num_threads(3)
    try:
        assert torch.equal(together, native.product(x, weight, None))
    finally:
        torch.set_num_threads(1)
