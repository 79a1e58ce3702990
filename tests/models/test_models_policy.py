"""Packed, prefix-shared, chunked numbers against transformers' own forward."""

from __future__ import annotations

import pytest
import torch
from families import CONFIGS, VOCABULARY, own_logps, ragged, tiny

from klimb.batch import Row, TokenBatch
from klimb.errors import KlimbError
from klimb.models import logprobs
from klimb.models.backbone import Backbone
from klimb.models.faces import Critic, Policy, PolicyOutputs, policy_logps, sequence_kl
from klimb.models.load import LoRA
from klimb.models.logprobs import Head, token_logps
from klimb.models.packing import Budget, pack, split_by_budget
from klimb.models.probe import probed_policy

pytestmark = pytest.mark.usefixtures("kernels")


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_packed_log_probs_equal_the_models_own(family: str, temperature: float) -> None:
    model, batch = tiny(family), ragged()
    logps = Policy(Backbone(model), None)(batch, temperature=temperature).logps
    expected = own_logps(model, batch, temperature)
    assert (logps.double() - expected).abs().max() < 5e-5  # fp32, log-probs down to −30


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_in_float64_they_agree_to_rounding(family: str) -> None:
    model, batch = tiny(family, dtype=torch.float64), ragged(seed=1)
    logps = Policy(Backbone(model), None)(batch).logps
    # The families compute their norms or their softmax in float32 whatever the weights are: hence not 1e-12.
    assert (logps - own_logps(model, batch)).abs().max() < 2e-5


@pytest.mark.parametrize("family", CONFIGS)
def test_the_probe_accepts_every_tested_family(family: str) -> None:
    _, line = probed_policy(Backbone(tiny(family)), None)
    assert "chunked head" in line


def test_no_document_sees_another() -> None:
    """Change one document of the pack: the log-probs of all others stay, to the bit."""
    policy, batch = Policy(Backbone(tiny("mistral-window")), None), ragged()
    before = policy(batch).logps
    (row,) = batch.rows[5]
    batch.rows[5] = [Row(row.prompt, [3] * len(row.completion), row.mask)]
    after = policy(batch).logps
    others = [i for i in range(len(batch)) if i != 5]
    assert torch.equal(before[others], after[others])
    assert not torch.equal(before[5], after[5])


def test_prompts_are_shared_and_no_padding_enters() -> None:
    batch = ragged()
    packed = pack(batch, torch.device("cpu"))
    prompts = {tuple(row.prompt) for (row,) in batch.rows}
    completions = sum(len(row.completion) for (row,) in batch.rows)
    assert len(packed.tokens) == sum(map(len, prompts)) + completions


def test_any_split_gives_the_same_log_probs() -> None:
    policy, batch = Policy(Backbone(tiny()), None), ragged(groups=5)
    whole = policy(batch).logps
    for budget in (1, 60, 150):
        parts = policy_logps(policy, batch, budget=budget).logps
        assert (parts - whole).abs().max() < 2e-5  # another order of the same sums


class Narrow(Policy):
    """On a device that holds so many samples at a time."""

    most = 3
    on_a_gpu = False

    def forward(self, batch: TokenBatch, *, temperature: float = 1.0, entropy: bool = False) -> PolicyOutputs:
        if len(batch) > self.most:
            if self.on_a_gpu:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            torch.empty(1 << 60, dtype=torch.uint8)  # the error of a CPU
        return super().forward(batch, temperature=temperature, entropy=entropy)


@pytest.mark.parametrize("on_a_gpu", [False, True], ids=["cpu", "gpu"])
def test_what_does_not_fit_is_computed_in_halves_to_the_same_result(
    on_a_gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Narrow, "on_a_gpu", on_a_gpu)
    backbone, batch, said = Backbone(tiny()), ragged(groups=5), list[str]()
    budget = Budget(10_000, said.append)
    narrow = policy_logps(Narrow(backbone, None), batch, budget=budget).logps
    assert (narrow - policy_logps(Policy(backbone, None), batch, budget=10_000).logps).abs().max() < 2e-5
    assert said[0].endswith("are computed at once, the result is the same")
    assert budget.tokens < 200  # and the next pass does not run into the wall again
    said.clear()
    policy_logps(Narrow(backbone, None), batch, budget=budget)
    assert said == []


def test_a_sample_that_does_not_fit_is_named() -> None:
    policy = Narrow(Backbone(tiny()), None)
    policy.most = 0
    with pytest.raises(KlimbError, match=r"^row \d+ does not fit into the memory: \d+ tokens at once are the least"):
        policy_logps(policy, ragged(), budget=100)


def test_micro_batches_keep_to_the_budget_and_are_balanced() -> None:
    batch = ragged(groups=8)
    lengths = []
    for part in split_by_budget(batch, 120):
        packed = pack(batch.select(part), torch.device("cpu"))
        lengths.append(len(packed.tokens))
        assert len(packed.tokens) <= 120 or len(part) == 1
    assert max(lengths[:-1]) <= 2 * min(lengths)
    assert sorted(i for part in split_by_budget(batch, 120) for i in part) == list(range(len(batch)))


def test_pairs_stay_together() -> None:
    batch = ragged(groups=6, samples=2)
    paired = TokenBatch.from_rows(batch.rows, batch.group.tolist(), batch.ids, whole_groups=True)
    for part in split_by_budget(paired, 1):
        assert len(part) == 2
        assert len(set(paired.group[part].tolist())) == 1


def test_a_sample_split_into_two_rows_is_still_one_line() -> None:
    """Its second turn with the first as context: the same log-probs, in the same places."""
    policy = Policy(Backbone(tiny()), None)
    prompt, first, middle, second = [5, 6, 7], [8, 9], [10, 11], [12, 13, 14]
    whole = Row(prompt, [*first, *middle, *second], [True] * 2 + [False] * 2 + [True] * 3)
    halves = [Row(prompt, first, [True] * 2), Row([*prompt, *first, *middle], second, [True] * 3)]
    one = policy(TokenBatch.from_rows([[whole]], [0], ["a"])).logps
    two = policy(TokenBatch.from_rows([halves], [0], ["a"])).logps
    assert one.shape == two.shape == (1, 5)
    assert (one - two).abs().max() < 1e-5


def test_a_first_token_without_a_prompt_is_refused_with_the_row() -> None:
    batch = TokenBatch.from_rows([[Row([], [4, 5], [True, True])]], [0], ["data.jsonl:3"])
    with pytest.raises(ValueError, match=r"data\.jsonl:3.*first token"):
        pack(batch, torch.device("cpu"))


def test_chunks_change_nothing_and_gradients_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprobs, "_CHUNK_ELEMENTS", 3 * 11)  # several ragged chunks
    torch.manual_seed(0)
    hidden = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 5, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(11, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(11, (7,))

    def compute(h: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        return token_logps(Head(w, b, scale=1.3, softcap=4.0), h, targets, temperature=0.7, entropy=True)

    assert torch.autograd.gradcheck(compute, (hidden, weight, bias))  # against finite differences
    logps, entropies = compute(hidden, weight, bias)
    plain = (4 * torch.tanh(1.3 * (hidden @ weight.T + bias) / 4) / 0.7).log_softmax(-1)
    assert entropies is not None
    assert torch.allclose(logps, plain.gather(1, targets[:, None])[:, 0], atol=1e-12)
    assert torch.allclose(entropies, -(plain.exp() * plain).sum(-1), atol=1e-12)


def test_gradients_equal_those_of_the_models_own_forward() -> None:
    batch = ragged()
    weights = torch.randn(batch.mask.shape)
    packed_model, own_model = tiny("qwen2"), tiny("qwen2")
    logps = Policy(Backbone(packed_model), None)(batch).logps
    torch.where(batch.mask, logps * weights, 0.0).sum().backward()
    own_model.set_attn_implementation("eager")
    total = torch.zeros(())
    for i, (row,) in enumerate(batch.rows):
        tokens = torch.tensor([[*row.prompt, *row.completion]])
        own = own_model(input_ids=tokens).logits[0].log_softmax(-1)
        marked = [len(row.prompt) + j for j, m in enumerate(row.mask) if m]
        total = total + sum(own[p - 1, tokens[0, p]] * weights[i, k] for k, p in enumerate(marked))
    total.backward()
    for (name, a), b in zip(packed_model.named_parameters(), own_model.parameters(), strict=True):
        scale = b.grad.abs().max().clamp(min=1e-6)
        assert (a.grad - b.grad).abs().max() / scale < 1e-4, name


def test_kl_to_the_reference_is_that_of_the_full_distributions() -> None:
    policy, reference = Policy(Backbone(tiny(seed=0)), None), Policy(Backbone(tiny(seed=1)), None)
    batch = TokenBatch.from_rows([[Row([3, 4], [5, 6, 7], [True] * 3)]], [0], ["a"])
    kl = sequence_kl(policy, reference, batch, budget=100)
    tokens = torch.tensor([[3, 4, 5, 6, 7]])
    logps = []
    for face in (policy, reference):
        face.backbone.model.set_attn_implementation("eager")
        with torch.no_grad():
            logps.append(face.backbone.model(input_ids=tokens).logits[0, 1:4].double().log_softmax(-1))
    expected = float((logps[0].exp() * (logps[0] - logps[1])).sum())
    assert float(kl[0]) == pytest.approx(expected, rel=1e-4)
    assert expected > 0.1  # far from what rounding could give


def test_a_model_that_klimb_cannot_compute_is_refused() -> None:
    import transformers

    config = transformers.MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(KlimbError, match="packed"):
        probed_policy(Backbone(model), None)


def test_attention_features_that_klimb_lacks_are_named() -> None:
    import transformers

    config = transformers.GptOssConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_local_experts=2, num_experts_per_tok=1,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="klimb").eval()
    with pytest.raises(KlimbError, match="s_aux"):
        probed_policy(Backbone(model), None)


# Activation checkpointing -------------------------------------------------------------------------------------------


def kept_for_backward(policy: Policy, batch: TokenBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor], int]:
    """Log-probs, gradients by name, and the bytes of activations that wait for the backward pass."""
    own = {p.untyped_storage().data_ptr() for p in policy.backbone.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        logps = policy(batch, temperature=0.7).logps
    logps.square().sum().backward()
    return logps, {n: p.grad for n, p in policy.trainable().items() if p.grad is not None}, sum(kept.values())


@pytest.mark.parametrize("lora", [None, LoRA(rank=2)], ids=["full", "lora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "gemma2", "gemma3"])
def test_activations_computed_again_change_no_bit(family: str, dtype: torch.dtype, lora: LoRA | None) -> None:
    batch, found = ragged(), []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        backbone = Backbone(tiny(family, dtype=dtype), None, lora)
        with torch.no_grad():  # a new adapter's second matrix is zero, and so would be the gradient of its first
            for name, parameter in backbone.named_parameters():
                if "lora_B" in name:
                    parameter.normal_()
        if checkpointing:
            backbone.checkpoint_activations()
        found.append(kept_for_backward(Policy(backbone, "policy" if lora else None), batch))
    (logps, gradients, kept), (again, gradients_again, kept_again) = found
    assert torch.equal(again, logps)
    assert gradients.keys() == gradients_again.keys()
    assert all(torch.equal(gradients_again[name], gradients[name]) for name in gradients)
    assert kept_again < 0.5 * kept  # two layers, of which each keeps its input alone; head and embedding stay


def test_a_model_without_layers_to_compute_again_is_refused() -> None:
    backbone = Backbone(tiny())
    backbone.model.model.layers = torch.nn.ModuleList()
    with pytest.raises(KlimbError, match="checkpointing: LlamaForCausalLM has no layers"):
        backbone.checkpoint_activations()


def test_the_kl_of_heads_of_two_sizes_is_that_over_the_tokens_that_both_know() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(5, 8), torch.randn(11, 8)
    other = 1.5 * weight
    padded = torch.cat([other, 50 * torch.ones(3, 8)])
    for ours, theirs, padding in ((weight, other, (weight, padded)), (other, weight, (padded, weight))):
        expected = logprobs.full_kl(Head(ours), hidden, Head(theirs), hidden)
        assert (expected > 0.01).all()
        assert torch.allclose(logprobs.full_kl(Head(padding[0]), hidden, Head(padding[1]), hidden), expected, atol=1e-6)


def test_scores_of_a_model_in_16_bits_are_read_in_32() -> None:
    """In bfloat16 neighbours of 4 are 1/32 apart."""
    torch.manual_seed(0)
    critic = Critic(Backbone(tiny("llama", dtype=torch.bfloat16)), None)
    with torch.no_grad():
        critic.value.weight.normal_()
        critic.value.bias.fill_(4.0)
    batch = ragged()
    with torch.no_grad():
        values = critic(batch)[batch.mask]
        packed = critic.backbone.pack(batch)
        states = critic.backbone.packed_states(packed, packed.predictors, packed.read)
    exact = states.double() @ critic.value.weight.double().t() + 4.0
    assert values.dtype == torch.float32
    assert torch.allclose(values.double(), exact.squeeze(1), atol=1e-5)
