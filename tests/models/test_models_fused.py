"""Small layers that the kernels take over: which ones, the same numbers and gradients, nothing else touched."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from families import CONFIGS, ragged, tiny
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from klimb import native
from klimb.models import fused, gradients, logprobs
from klimb.models.backbone import Backbone
from klimb.models.faces import Policy
from klimb.models.logprobs import Head, token_logps
from klimb.models.outline import Shape

pytestmark = pytest.mark.skipif(native.why_not() is not None, reason=f"no kernels: {native.why_not()}")

# What of each family is taken over: norms, gated MLPs, attentions by their rotary positions, GELUs, linear layers,
# embeddings (Gemma scales its own; GPT-2 has positions besides), whole decoder layers.
TAKEN = {
    "llama": (5, 2, 2, 0, 15, 1, 2),
    "llama-tied": (5, 2, 2, 0, 15, 1, 2),
    "qwen2": (5, 2, 2, 0, 15, 1, 2),
    "qwen3": (9, 2, 2, 0, 15, 1, 2),
    "mistral-window": (5, 2, 2, 0, 15, 1, 2),
    "gemma2": (9, 0, 2, 2, 15, 0, 0),
    "gemma3": (13, 0, 2, 2, 15, 0, 0),
    "cohere-scaled": (0, 2, 0, 0, 15, 1, 0),
    "gpt2": (0, 0, 0, 2, 9, 2, 0),
}


@pytest.fixture(autouse=True)
def native_on() -> Iterator[None]:
    native.use(True)
    yield
    native.use(True)


def taken(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if "forward" in vars(module)]


@pytest.mark.parametrize("family", CONFIGS)
def test_what_is_taken_over(family: str) -> None:
    model = tiny(family)
    modules = taken(model)
    names = ("RMSNorm", "MLP", "Attention", "GELU", "Linear|Conv1D", "Embedding", "DecoderLayer")
    kinds = [sum(bool(re.search(name, type(module).__name__)) for module in modules) for name in names]
    assert tuple(kinds) == TAKEN[family]
    assert len(modules) == sum(kinds)


@pytest.mark.parametrize("family", CONFIGS)
def test_log_probs_and_gradients_are_those_of_torch(family: str) -> None:
    model = tiny(family)
    policy, batch = Policy(Backbone(model), None), ragged()
    found = []
    for on in (True, False):
        native.use(on)
        model.zero_grad()
        logps = policy(batch).logps
        logps.square().mean().backward()
        found.append((logps.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (ours, slopes), (theirs, expected) = found
    # The log-probs reach -30 and the weights were spread by 4: rounding of both paths, not only of the kernels.
    torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)
    assert slopes.keys() == expected.keys()
    for name, gradient in slopes.items():
        assert (gradient - expected[name]).norm() <= 1e-4 * expected[name].norm() + 1e-6, name


@pytest.mark.parametrize("family", CONFIGS)
def test_in_bfloat16_they_are_nearer_to_float32_than_those_of_torch_or_as_near(family: str) -> None:
    model = tiny(family, dtype=torch.bfloat16)
    policy, batch = Policy(Backbone(model), None), ragged()
    exact = Policy(Backbone(tiny(family)), None)
    exact.load_state_dict(policy.state_dict())

    def passed(which: Policy, on: bool) -> tuple[Tensor, Tensor]:
        native.use(on)
        which.zero_grad()
        logps = which(batch).logps
        logps.square().mean().backward()
        return logps.detach(), torch.cat([p.grad.float().flatten() for p in which.parameters() if p.grad is not None])

    expected, ours, theirs = passed(exact, False), passed(policy, True), passed(policy, False)
    for found, torchs, right in zip(ours, theirs, expected, strict=True):
        # Weights were spread by 4, so that rounding to 8 bits shows: the bound is what torch's own path is off by.
        assert not found.equal(torchs)
        assert (found - right).norm() <= 1.25 * (torchs - right).norm()


@pytest.mark.parametrize("family", CONFIGS)
def test_gradients_of_several_micro_batches_are_added_in_place(family: str) -> None:
    model = tiny(family)
    policy, batches = Policy(Backbone(model), None), [ragged(seed=seed) for seed in range(3)]
    head = model.get_output_embeddings()
    weights = [m.weight for m in model.modules() if type(m) in (nn.Linear, Conv1D) and m is not head]
    arrived: list[bool] = []
    for weight in weights:
        weight.register_hook(lambda gradient: arrived.append(gradient is not None))
    found = []
    for on in (True, False):
        native.use(on)
        model.zero_grad()
        arrived.clear()
        for batch in batches:
            policy(batch).logps.square().mean().backward()
        assert sum(arrived) == len(weights) * (1 if on else 3)  # what is added in place comes to no hook
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    ours, expected = found
    assert ours.keys() == expected.keys()
    for name, gradient in ours.items():
        assert (gradient - expected[name]).norm() <= 1e-4 * expected[name].norm() + 1e-6, name


class GatedMLP(nn.Module):
    """As Llama writes it."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (
            nn.Linear(*shape, bias=False, dtype=dtype) for shape in ((24, 40), (24, 40), (40, 24))
        )
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_gated_mlp_is_one_step_of_autograd_and_keeps_less(dtype: torch.dtype) -> None:
    """Two micro-batches against its parts, which are taken as soon as somebody looks in between."""
    torch.manual_seed(0)
    model = nn.Sequential(GatedMLP(dtype))
    fused.take_over(model)
    x, factor = torch.randn(1, 7, 24, dtype=dtype), torch.randn(1, 7, 24, dtype=dtype)
    seen: list[Tensor] = []
    found: list[list[Tensor]] = []
    kept: list[int] = []
    for looked_at in (False, True):
        if looked_at:
            model[0].down_proj.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
        model.zero_grad()
        given = x.clone().requires_grad_()
        held: list[Tensor] = []

        def hold(t: Tensor, held: list[Tensor] = held) -> Tensor:
            held.append(t)
            return t

        for _ in range(2):
            with torch.autograd.graph.saved_tensors_hooks(hold, lambda t: t):
                y = model(given)
            (y * factor).sum().backward()
        found.append([y.detach(), given.grad, *(p.grad for p in model.parameters())])
        kept.append(len({t.data_ptr() for t in held if t.shape[-1] == 40 and t.dim() == 3}))
    assert [t.shape for t in seen] == [(1, 7, 40)] * 2
    assert kept == [4, 6]  # gate and up of each micro-batch, not what they make together
    assert found[0][0].equal(found[1][0])
    close = {torch.float32: 1e-6, torch.bfloat16: 2**-7}[dtype]  # the input's gradients are summed in another order
    for ours, theirs in zip(*found, strict=True):
        assert (ours - theirs).norm() <= close * theirs.norm()


@pytest.mark.parametrize("by_column", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_gated_mlp_adds_its_gradients_where_the_sums_are(dtype: torch.dtype, by_column: bool) -> None:
    torch.manual_seed(0)
    model, plain = nn.Sequential(GatedMLP(dtype)), GatedMLP(torch.float32).double()
    plain.load_state_dict(model[0].state_dict())
    if by_column:
        for weight in model.parameters():
            weight.data = weight.data.t().contiguous().t()
    fused.take_over(model)
    arrived: list[bool] = []
    for weight in model.parameters():
        weight.register_hook(lambda gradient: arrived.append(gradient is not None))
    for seed in range(3):
        x = torch.randn(1, 7, 24, generator=torch.Generator().manual_seed(seed)).to(dtype)
        model(x).float().sum().backward()
        plain(x.double()).sum().backward()
        if dtype == torch.bfloat16 and not seed:
            for weight in model.parameters():
                assert weight.grad is not None
                gradients.share(weight, weight.grad.float())
    assert arrived == [True] * 3 + [False] * 6
    for weight, exact in zip(model.parameters(), plain.parameters(), strict=True):
        found = getattr(weight, "main_grad", weight.grad)
        assert found.dtype == torch.float32
        close = {torch.float32: 1e-6, torch.bfloat16: 2**-6}[dtype]
        assert (found - exact.grad).norm() <= close * exact.grad.norm()


@pytest.mark.parametrize("name", ["gate_proj", "down_proj"])
def test_a_gated_mlp_of_which_a_part_is_frozen(name: str) -> None:
    """A gradient that a frozen weight has from before is left alone."""
    model, plain = nn.Sequential(GatedMLP(torch.float32)), GatedMLP(torch.float32)
    plain.load_state_dict(model[0].state_dict())
    fused.take_over(model)
    frozen = getattr(model[0], name).weight.requires_grad_(False)
    frozen.grad = before = torch.ones_like(frozen)
    x = torch.randn(1, 3, 24)
    for module in (model, plain):
        module(x).square().sum().backward()
    assert frozen.grad is before
    assert before.eq(1).all()
    for (which, ours), theirs in zip(model[0].named_parameters(), plain.parameters(), strict=True):
        if which != f"{name}.weight":
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", CONFIGS)
def test_activations_that_are_computed_again_change_no_bit(family: str) -> None:
    """Of long runs neither: there a product has its terms in several parts, and adding it to a sum is another order
    than adding its parts."""
    found = []
    for again in (False, True):
        policy = Policy(Backbone(tiny(family)), None)
        if again:
            policy.backbone.checkpoint_activations()
        for seed in range(2):
            policy(ragged(groups=8, samples=8, seed=seed)).logps.square().mean().backward()
        found.append({n: p.grad for n, p in policy.named_parameters() if p.grad is not None})
    kept, anew = found
    assert kept.keys() == anew.keys()
    assert [name for name in kept if not kept[name].equal(anew[name])] == []


@pytest.mark.parametrize("padding", [None, 0, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_that_were_looked_up_are_added_where_the_sum_is(dtype: torch.dtype, padding: int | None) -> None:
    """In 16 bits to the master's gradient, in float32: the third of three equal batches counts as much as the first."""
    layer = nn.Embedding(9, 6, padding_idx=padding, dtype=dtype)
    fused.take_over(nn.Sequential(layer))
    tokens, expected = torch.tensor([[4, 4, 0, 7, 4]]), nn.Embedding(9, 6, padding_idx=padding)
    factor = torch.arange(30.0).view(1, 5, 6) / 8  # nothing here is rounded by bfloat16, their sums are
    for _ in range(3):
        (layer(tokens).float() * factor).sum().backward()
        (expected(tokens) * factor).sum().backward()
        assert layer.weight.grad is not None
        if dtype == torch.bfloat16 and getattr(layer.weight, "main_grad", None) is None:
            gradients.share(layer.weight, layer.weight.grad.float())
            layer.weight.grad.zero_()
    found = layer.weight.grad if dtype == torch.float32 else layer.weight.main_grad  # type: ignore[attr-defined]
    assert torch.equal(found, expected.weight.grad)
    if dtype == torch.bfloat16:
        assert not layer.weight.grad.any()  # all of it came to the sum


@pytest.mark.parametrize("on", [True, False])
def test_the_heads_gradient_is_added_where_the_sum_is(on: bool) -> None:
    native.use(on)
    weight, targets = nn.Parameter(torch.randn(11, 6)), torch.randint(0, 11, (40,))
    arrived: list[Tensor] = []
    weight.register_hook(arrived.append)
    plain = weight.detach().clone().requires_grad_()
    for seed in range(3):
        states = torch.randn(40, 6, generator=torch.Generator().manual_seed(seed))
        token_logps(Head(weight), states, targets)[0].sum().backward()
        (states @ plain.T).log_softmax(-1).gather(1, targets[:, None]).sum().backward()
    assert [gradient is not None for gradient in arrived] == [True, False, False]
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, plain.grad, rtol=1e-5, atol=1e-5)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What autograd holds of each pass through a head, its `kept` logits among it."""
    found: list[Any] = []
    apply = logprobs._TokenLogps.apply

    def applied(*given: Any) -> Any:
        answer = apply(*given)
        found.append(answer[0].grad_fn)
        return answer

    monkeypatch.setattr(logprobs._TokenLogps, "apply", applied)
    return found


def test_few_logits_wait_for_the_backward_pass(monkeypatch: pytest.MonkeyPatch, passes: list[Any]) -> None:
    """To the bit the same gradient, a second time too; of many none wait."""
    states, weight = torch.randn(300, 6, requires_grad=True), torch.randn(11, 6, requires_grad=True)
    targets, bias = torch.randint(0, 11, (300,)), torch.randn(11, requires_grad=True)
    monkeypatch.setattr(logprobs, "_CHUNK_ELEMENTS", 1)  # three chunks

    def total() -> Tensor:
        head = Head(weight, bias, scale=1.3, softcap=4.0)
        logps, entropies = token_logps(head, states, targets, temperature=0.7, entropy=True)
        assert entropies is not None
        return (logps.square() + entropies).sum()

    gradients_of = lambda loss: torch.autograd.grad(loss, (states, weight, bias), retain_graph=True)  # noqa: E731
    loss = total()
    assert [len(chunk) for chunk in passes[0].kept] == [128, 128, 44]
    first = gradients_of(loss)
    assert passes[0].kept == []  # their places are taken
    again = gradients_of(loss)
    monkeypatch.setattr(logprobs, "_KEPT_ELEMENTS", 300 * 11 - 1)
    loss = total()
    assert passes[1].kept == []
    assert all(a.equal(b) and a.equal(c) for a, b, c in zip(first, again, gradients_of(loss), strict=True))


def test_as_many_logits_wait_as_the_plan_says(passes: list[Any]) -> None:
    shape, policy = Shape(8, 8, 2), Policy(Backbone(tiny()), None)
    policy(shape.batch(shape.fitting(64)))
    vocabulary = policy.backbone.model.config.vocab_size
    assert sum(chunk.nbytes for chunk in passes[0].kept) == logprobs.kept_logits(5 * 8, vocabulary) > 0
    with torch.no_grad():
        policy(shape.batch(2))
    assert passes[1] is None  # nothing is held of what no gradient is asked of


@pytest.mark.parametrize("on", [True, False])
def test_layers_that_only_look_alike_are_left_alone(on: bool) -> None:
    class CenteredRMSNorm(nn.Module):
        """Named like one, with its parts, and it subtracts the mean."""

        def __init__(self) -> None:
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.ones(8)), 1e-6

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.layer_norm(x, x.shape[-1:], eps=self.eps) * self.weight

    model = nn.Sequential(CenteredRMSNorm())
    native.use(on)
    fused.take_over(model)
    assert not taken(model)
    assert native.use(on) is on


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_types_go_the_layers_own_way(dtype: torch.dtype) -> None:
    model, plain = tiny("qwen3", dtype=dtype), tiny("qwen3", dtype=dtype)
    for module in taken(plain):
        del module.forward
    assert taken(model)
    assert not taken(plain)
    assert torch.equal(Policy(Backbone(model), None)(ragged()).logps, Policy(Backbone(plain), None)(ragged()).logps)


class GatedRMSNorm(nn.Module):
    """As some hybrids have it: a norm by its name and parameters, called with a gate besides."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(24)), 1e-6

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return x * self.weight * gate


class AtTimesGatedRMSNorm(GatedRMSNorm):
    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        return x * self.weight * gate.sigmoid()  # type: ignore[union-attr]


def test_a_layer_that_is_called_otherwise_is_left_alone() -> None:
    model = nn.Sequential(GatedRMSNorm(), AtTimesGatedRMSNorm(), nn.Linear(4, 4))
    native.use(False)
    fused.take_over(model)
    assert [type(module).__name__ for module in taken(model)] == ["Linear"]
    assert not native.takes(torch.ones(1))  # as it was before
