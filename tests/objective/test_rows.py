"""Every row of the table against its formula, written out sample by sample and token by token.

The oracles share nothing with the library but the batch: lists, the statistics module and scalars of torch, which
differentiate what is written (`.detach()` where a paper stops the gradient).
"""

from __future__ import annotations

import math
import statistics
from dataclasses import replace

import pytest
import torch
from test_policy_loss import GROUP, LENGTH, LENGTHS, MASK, TOTALS, advantages_of, columns_of, inputs, loss_and_gradient

from klimb.batch import BatchTotals
from klimb.objective import ALGORITHMS, assign_credit, policy_loss, update_columns
from klimb.objective.group_advantage import COMPARING
from klimb.objective.surrogate import reinforce

ROWS = {name: row.resolve(max_length=LENGTH) for name, row in ALGORITHMS.items()}
EVERYTHING = [list(range(len(MASK)))]
PRESENT = [i for i in range(len(MASK)) if LENGTHS[i]]
N = [int(n) for n in LENGTHS]
TOKENS = [(i, t) for i in PRESENT for t in range(N[i])]


# Advantages: {(i, t): A} --------------------------------------------------------------------------------------------


def per_sample(values):
    return {(i, t): values[i] for i, t in TOKENS}


def members(i):
    return [j for j in PRESENT if GROUP[j] == GROUP[i]]


def scores(given, beta=0.0, overlong=None):
    """Score less β · (log π − log π_ref) of the whole sample, as it was sampled."""
    x = given["behavior_logps"].double() - given["ref_logps"].double()
    price = {i: overlong(N[i]) if overlong else 0.0 for i in PRESENT}
    return {i: given["scores"][i].item() + price[i] - beta * x[i, : N[i]].sum().item() for i in PRESENT}


def of_group(function, **shaping):
    """function(i, R, members of its group) → A."""
    return lambda given: per_sample({i: function(i, scores(given, **shaping), members(i)) for i in PRESENT})


def dapo_price(length):
    """Nothing up to 4 of 5 tokens, −1 at 5."""
    return min(0.0, (4 - length) / 1)


def zscore(i, r, js):
    values = [r[j] for j in js]
    return (r[i] - statistics.mean(values)) / (statistics.stdev(values) + 1e-4)


def centred(i, r, js):
    return r[i] - statistics.mean([r[j] for j in js])


def others(i, r, js):
    return r[i] - statistics.mean([r[j] for j in js if j != i])


def weighted_by_length(i, r, js):
    return r[i] - sum(N[j] * r[j] for j in js) / sum(N[j] for j in js)


def best(i, r, js):
    first, second = sorted((r[j] for j in js), reverse=True)[:2]
    return (first - second) / (statistics.stdev([r[j] for j in js]) + 1e-6) if r[i] == first else 0.0


def relative(i, r, js):
    mean = statistics.mean([r[j] for j in js])
    return (r[i] - mean) / mean if mean > 0 else 0.0


def lite(given):
    r = scores(given)
    spread = statistics.stdev(r.values()) + 1e-4
    return per_sample({i: centred(i, r, members(i)) / spread for i in PRESENT})


def decoupled_parts(given):
    total = {i: 0.0 for i in PRESENT}
    for k, weight in enumerate(given["part_weights"].tolist()):
        part = {i: given["parts"][i, k].item() for i in PRESENT}
        for i in PRESENT:
            total[i] += weight * zscore(i, part, members(i))
    mean, spread = statistics.mean(total.values()), statistics.stdev(total.values())
    return per_sample({i: (total[i] - mean) / (spread + 1e-4) for i in PRESENT})


def token_baseline(given):
    r, p, s = scores(given), given["behavior_logps"].exp(), given["collisions"]
    energy = {(i, t): sum(1 - 2 * p[i, j].item() + s[i, j].item() for j in range(t + 1)) for i, t in TOKENS}
    found = {}
    for i, t in TOKENS:
        there = [j for j in members(i) if N[j] > t]
        found[i, t] = r[i] - sum(r[j] * energy[j, t] for j in there) / sum(energy[j, t] for j in there)
    return found


def whitened(advantages):
    mean, spread = statistics.mean(advantages.values()), statistics.pstdev(advantages.values())
    return {key: (a - mean) / (spread + 1e-8) for key, a in advantages.items()}


def token_rewards(given, beta):
    x = given["behavior_logps"].double() - given["ref_logps"].double()
    return {(i, t): -beta * x[i, t].item() + (given["scores"][i].item() if t == N[i] - 1 else 0.0) for i, t in TOKENS}


def gae(given, beta, lam):
    """lam(length) → λ."""
    r, v, found = token_rewards(given, beta), given["values"], {}
    for i in PRESENT:
        delta = [r[i, t] + (v[i, t + 1].item() if t + 1 < N[i] else 0.0) - v[i, t].item() for t in range(N[i])]
        for t in range(N[i]):
            found[i, t] = sum(lam(N[i]) ** (k - t) * delta[k] for k in range(t, N[i]))
    return found


def reweighted(advantages, given):
    weight = {i: given["scores"][i].item() ** 2 for i in PRESENT}
    mean = statistics.mean(weight.values())
    return {(i, t): a * weight[i] / mean for (i, t), a in advantages.items()}


def to_go(given):
    r = token_rewards(given, 0.01)
    return whitened({(i, t): sum(r[i, k] for k in range(t, N[i])) for i, t in TOKENS})


def less(baseline, **shaping):
    return lambda given: per_sample({i: r - baseline(i, given) for i, r in scores(given, **shaping).items()})


def minus_mean(given):
    r = scores(given, beta=0.05)
    return per_sample({i: r[i] - statistics.mean(r.values()) for i in PRESENT})


ADVANTAGES = {
    "reinforce": minus_mean,
    "rloo": of_group(others, beta=0.05),
    "reinforce++": to_go,
    "ppo": lambda given: whitened(gae(given, 0.02, lambda n: 0.95)),
    "dapo": of_group(zscore, overlong=dapo_price),
    "cispo": of_group(zscore, overlong=dapo_price),
    "top_entropy": of_group(zscore, overlong=dapo_price),
    "dr_grpo": of_group(centred),
    "dro_old": of_group(centred),
    "topr": of_group(centred),
    "dppo": of_group(centred),
    "dppo_kl": of_group(centred),
    "remax": less(lambda i, given: given["baseline"][i].item(), beta=0.05),
    "reinforce++_baseline": lambda given: whitened(of_group(centred)(given)),
    "opo": of_group(weighted_by_length),
    "gpg": of_group(centred),  # all groups differ: α = 1
    "lite_ppo": lite,
    "passk_grpo": of_group(best),
    "gdpo": decoupled_parts,
    "maxrl": of_group(relative),
    "otb": token_baseline,
    "vapo": lambda given: whitened(gae(given, 0.0, lambda n: max(0.0, 1 - 1 / (0.05 * n)))),
    "pf_ppo": lambda given: reweighted(whitened(gae(given, 0.02, lambda n: 0.95)), given),
    "a_star_po": less(lambda i, given: given["baseline"][i].item()),
    "dro": less(lambda i, given: given["values"][i, 0].item()),
    "nash_md": lambda given: per_sample(
        {i: 1 / (1 + math.exp(given["baseline"][i].item() - r)) - 0.5 for i, r in scores(given).items()}
    ),
}


def advantage_of(name, given):
    return ADVANTAGES.get(name, of_group(zscore))(given)


# Losses of a token: f(new, old, A) with scalars ----------------------------------------------------------------------


def ratio_of(new, old):
    return (new - old).exp()


def plain(new, old, a):
    return -a * new


def unbounded(new, old, a):
    return -a * ratio_of(new, old)


def ppo_clip(low, high):
    def loss(new, old, a):
        r = ratio_of(new, old)
        return -min(r * a, r.clamp(1 - low, 1 + high) * a)

    return loss


def two_sided(new, old, a):
    r = ratio_of(new, old)
    return -min(r.clamp(max=4.0) * a, r.clamp(0.8, 1.2) * a)


def soft_gate(new, old, a):
    tau = 1.0 if a > 0 else 1.05
    return -4 / tau * a / (1 + (-tau * (ratio_of(new, old) - 1)).exp())


def bounded_weight(new, old, a):
    return -ratio_of(new, old).clamp(max=5.0).detach() * a * new


def total_variation(new, old, a):
    moved = (new.exp() - old.exp()).item()
    return unbounded(new, old, a) if (moved <= 0.2 if a > 0 else moved >= -0.2) else 0.0


def binary_kl(new, old, a):
    p, q = math.exp(new.item()), math.exp(old.item())
    far = q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p)) > 0.05
    return 0.0 if far and (p > q if a > 0 else p < q) else unbounded(new, old, a)


def pulled_back(new, old, a):
    return -a * new + 0.05 * (new - old) ** 2


TOKEN_LOSSES = {
    **dict.fromkeys(("reinforce", "rloo", "remax", "opo", "gpg", "a_star_po", "dro", "nash_md"), plain),
    **dict.fromkeys(("dapo", "vapo", "top_entropy"), ppo_clip(0.2, 0.28)),
    **dict.fromkeys(("kl_cov", "m2po"), unbounded),
    "cispo": bounded_weight,
    "intellect2": two_sided,
    "sapo": soft_gate,
    "dppo": total_variation,
    "dppo_kl": binary_kl,
    "dro_old": pulled_back,
}
SAMPLED = ("vespo", "topr", "dppo", "dppo_kl")  # the ratio is to the policy that sampled


def sequence_losses(name, new, old, a):
    """Losses of the tokens of one sample; new, old and a are lists."""
    n = len(new)
    if name in ("gspo", "luspo"):
        low, high = (3e-4, 4e-4) if name == "gspo" else (2e-3, 2.5e-3)
        s = (sum(x - y for x, y in zip(new, old)) / n).exp()
        return [-min(s * b, s.clamp(1 - low, 1 + high) * b) for b in a]
    if name == "gmpo":
        held = [(x - y).clamp(max=0.4) if b > 0 else (x - y).clamp(min=-0.4) for x, y, b in zip(new, old, a)]
        return [-b * (sum(held) / n).exp() for b in a]
    if name == "vespo":
        w = sum(x - y for x, y in zip(new, old)).exp().item()
        return [
            -b * x * (w**2 * math.exp(3 * (1 - w)) if b >= 0 else w**3 * math.exp(2 * (1 - w))) for x, b in zip(new, a)
        ]
    if name == "topr":
        w = min(1.0, math.prod(math.exp(x.item() - y.item()) for x, y in zip(new, old)))
        return [-b * x * (1.0 if b >= 0 else w) for x, b in zip(new, a)]
    return [TOKEN_LOSSES.get(name, ppo_clip(0.2, 0.2))(x, y, b) for x, y, b in zip(new, old, a)]


# Which tokens count --------------------------------------------------------------------------------------------------


def chosen(name, given, a):
    """{(i, t): counts?}, by the definition of each filter; Clip-Cov draws, its choice is tested by itself."""
    if name == "top_entropy":
        entropy = {key: given["entropy"][key].item() for key in TOKENS}
        bound = torch.quantile(torch.tensor(list(entropy.values()), dtype=torch.float64), 0.8).item()
        return {key: entropy[key] >= bound - 1e-12 for key in TOKENS}
    if name == "m2po":
        moment = {key: (given["logps"][key] - given["behavior_logps"][key]).item() ** 2 for key in TOKENS}
        left = sorted(TOKENS, key=moment.get)
        while statistics.mean(moment[key] for key in left) >= 0.04:
            left.pop()
        assert 0 < len(left) < len(TOKENS)
        return {key: key in left for key in TOKENS}
    if name == "kl_cov":
        logps = {key: given["logps"][key].item() for key in TOKENS}
        means = statistics.mean(a.values()), statistics.mean(logps.values())
        top = max(TOKENS, key=lambda key: (a[key] - means[0]) * (logps[key] - means[1]))
        return {key: key != top for key in TOKENS}
    return {key: bool(columns_of(ROWS[name], given, advantages_of(ROWS[name], given))["kept"][key]) for key in TOKENS}


# The whole loss ------------------------------------------------------------------------------------------------------

BY_TOKEN = (
    *("reinforce++", "ppo", "dapo", "cispo", "reinforce++_baseline", "lite_ppo", "vapo", "vespo"),
    *("clip_cov", "kl_cov", "m2po", "top_entropy", "pf_ppo"),
)
BY_ONE = ("reinforce", "rloo", "remax", "luspo", "a_star_po", "dro", "nash_md")
BY_CONSTANT = ("dr_grpo", "opo", "passk_grpo", "maxrl", "otb", "dro_old", "topr", "dppo", "dppo_kl")


def weight_of(name, i):
    """What the loss of one token of sample i is divided by."""
    if name in BY_TOKEN:
        return len(TOKENS)
    if name in BY_ONE:
        return len(PRESENT)
    return len(PRESENT) * (LENGTH if name in BY_CONSTANT else N[i])


def written_out(name, given, logps):
    a = advantage_of(name, given)
    old = given["behavior_logps" if name in SAMPLED else "old_logps"]
    counts = chosen(name, given, a) if ROWS[name].token_filter else dict.fromkeys(TOKENS, True)
    total = torch.zeros((), dtype=torch.float64)
    for i in PRESENT:
        span = range(N[i])
        losses = sequence_losses(name, [logps[i, t] for t in span], [old[i, t] for t in span], [a[i, t] for t in span])
        for t in span:
            if counts[i, t]:
                total = total + losses[t] / weight_of(name, i)
            elif name == "kl_cov":
                total = total + (losses[t] + (logps[i, t] - old[i, t]).abs()) / weight_of(name, i)
            if name in ("grpo", "gdpo", "intellect2"):
                x = given["ref_logps"][i, t] - logps[i, t]
                total = total + (0.001 if name == "intellect2" else 0.04) * (x.exp() - x - 1) / weight_of(name, i)
            if name == "reinforce++_baseline":
                total = total + 0.01 / 2 * (logps[i, t] - given["ref_logps"][i, t]) ** 2 / weight_of(name, i)
        if name in ("a_star_po", "dro", "nash_md"):  # β/2 (log π/π_ref)², of which the cross term is the loss above
            x = sum(logps[i, t] - given["ref_logps"][i, t] for t in span)
            total = total + {"a_star_po": 1e-3, "dro": 1.0, "nash_md": 0.1}[name] / 2 * x**2 / len(PRESENT)
    if name == "vapo":
        right = [(i, t) for i, t in TOKENS if given["scores"][i] > 0]
        total = total - 0.1 * sum(logps[key] for key in right) / len(right)
    return total


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", ROWS)
def test_value_and_gradient_are_the_formulas(name, seed):
    given = inputs(seed=seed)
    logps = given["logps"].clone().requires_grad_()
    expected = written_out(name, given, logps)
    (gradient,) = torch.autograd.grad(expected, logps)
    loss, found, _ = loss_and_gradient(ROWS[name], given, EVERYTHING)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9, abs=1e-9)
    assert (found - gradient).norm() <= 1e-9 * gradient.norm()
    assert gradient.norm() > 0


@pytest.mark.parametrize("name", ROWS)
def test_at_ratio_one_every_row_pulls_as_reinforce_does(name):
    """With the same advantages, tokens, KL and denominators; the first update after sampling is no other."""
    row, given = ROWS[name], inputs()
    given |= {"old_logps": given["logps"], "behavior_logps": given["logps"]}
    advantages = advantages_of(row, given)
    columns = columns_of(row, given, advantages)

    def gradient(algorithm):
        logps = given["logps"].clone().requires_grad_()
        common = {"ref_logps": given["ref_logps"], "behavior_logps": given["logps"], "entropy": given["entropy"]}
        loss, _ = policy_loss(
            algorithm, logps=logps, advantages=advantages, mask=MASK, totals=TOTALS, **common, **columns
        )
        return torch.autograd.grad(loss, logps)[0]

    assert torch.allclose(gradient(row), gradient(replace(row, surrogate=reinforce)), rtol=1e-10, atol=1e-14)


def credit_of(name, scores, mask, group):
    """Advantages of samples that differ in nothing but their score; further inputs are the same for all."""
    zeros = torch.zeros(mask.shape, dtype=torch.float64)
    logps = torch.where(mask, -1.0, 0.0).double()
    scores = torch.tensor(scores, dtype=torch.float64)
    return assign_credit(
        ROWS[name], scores=scores, mask=mask, group=torch.tensor(group), logps=logps, ref_logps=logps, values=zeros,
        parts=torch.stack([scores, -2 * scores], dim=1), part_weights=torch.tensor([1.0, 3.0]),
        baseline=zeros[:, 0], collisions=zeros + 0.5,
    ).advantages  # fmt: skip


def compares(name):
    return ROWS[name].advantage in COMPARING or type(ROWS[name].advantage) in COMPARING


@pytest.mark.parametrize("name", [name for name in ROWS if compares(name)])
def test_a_group_without_variance_moves_nothing(name):
    """Exactly, beside a group that differs; whitening shifts it with all the others and is the known exception.

    Its samples are of one length: a price on length would make them differ.
    """
    mask = torch.tensor([[1, 1], [1, 1], [1, 1], [1, 0], [1, 1]], dtype=torch.bool)
    found = credit_of(name, [0.1 + 0.2, 0.3, 0.3, 1.0, 0.0], mask, [0, 0, 0, 1, 1])
    if ROWS[name].normalise is None:
        assert (found[:3] == 0).all()
    else:
        assert (found[:3][mask[:3]] == found[0, 0]).all()
    assert (found[3:][mask[3:]] != 0).any()


@pytest.mark.parametrize("name", ROWS)
def test_a_single_sample_is_finite_and_nothing_where_it_has_nobody_to_compare_with(name):
    found = credit_of(name, [1.5], torch.ones(1, 3, dtype=torch.bool), [0])
    assert found.isfinite().all()
    assert not compares(name) or (found == 0).all()


@pytest.mark.parametrize("name", ROWS)
def test_an_update_without_a_token_is_zero(name):
    row, given, nothing = ROWS[name], inputs(), torch.zeros_like(MASK)
    names = ("logps", "old_logps", "behavior_logps", "entropy")
    advantages = credit_of(name, [1.0] * len(MASK), nothing, GROUP.tolist())
    assert (advantages == 0).all()
    columns = update_columns(
        row, advantages=advantages, mask=nothing, scores=given["scores"], **{n: given[n] for n in names}
    )
    logps = given["logps"].clone().requires_grad_()
    rest = {n: given[n] for n in (*names[1:], "ref_logps")}
    totals = BatchTotals.of(nothing, GROUP)
    loss, _ = policy_loss(row, logps=logps, advantages=advantages, mask=nothing, totals=totals, **rest, **columns)
    loss.backward()
    assert loss == 0
    assert (logps.grad == 0).all()
