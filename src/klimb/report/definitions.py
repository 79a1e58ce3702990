"""What the page's words mean. A pipeline's own wording (summary["definitions"]) replaces or extends these."""

from __future__ import annotations

from klimb.report.load import Records
from klimb.report.text import plain
from klimb.report.tracks import WINDOW

KL_ESTIMATORS = {
    "k1": "k1, Σ over the reply's tokens of log π − log π_ref: unbiased, may be negative on a batch",
    "k2": "k2, Σ ½(log π − log π_ref)²: biased, never negative",
    "k3": "k3, Σ (ratio − 1 − log ratio) with ratio = π_ref/π: unbiased, never negative",
    "full": "exact over the whole vocabulary at each position of sampled replies, summed (Rao–Blackwellised)",
}
ALWAYS = {
    "proxy": "The score that training climbs: of a reward model or function, before any KL penalty; mean over replies.",
    "gold": "A judge of quality that training never sees, of the same replies; mean over replies.",
    "better, worse, not shown": "Better or worse: the method's gold interval lies wholly above or below "
    "the baseline's. Overlapping or missing intervals: not shown. Where paired differences over seeds are "
    "given, their interval against 0 decides. The highest of several is picked after the fact.",
    "√KL": "The distance axis of Gao et al. (2022): gains begin linear in it.",
    "moving mean": f"Thick lines: centred mean of {WINDOW} steps (fewer at the ends). Faint points: the "
    "values themselves. A peak of a moving mean is biased slightly upwards.",
}
SAMPLED = {
    "best-of-n": "The reply with the highest proxy out of n from the starting policy, no training. "
    "Its KL is written as log n − (n−1)/n, an upper bound.",
}
ONLINE = {
    "entropy": "Of the policy's next-token distribution, mean over sampled tokens, in nats.",
    "clip fraction": "Share of tokens whose importance ratio lies beyond the clip: they give no gradient.",
    "explained variance": "1 − Var(return − value) / Var(return) of the critic; 1 is perfect, ≤ 0 useless.",
    "groups without variance": "Share of prompts whose completions all score the same: advantages 0.",
}

TRUST = {
    "expected calibration error": "Pairs in bins by σ(|difference|), how sure the reward is of its order; the mean "
    "over pairs of how far a bin's share in the right order is from that. Of few pairs it comes out too high.",
    "Kolmogorov–Smirnov distance": "The largest distance between two distribution functions: 0 for equal ones, 1 where "
    "they do not overlap.",
}


def definitions(records: Records) -> dict[str, str]:
    """Term -> meaning, only terms that the page uses."""
    stages = {run.stage for run in records.runs}
    own = records.summary.get("definitions")
    distance = "Distance from the reference policy in nats per reply, mean over replies."
    return (
        ALWAYS
        | {"KL": f"{distance} {_estimator(records)}", "[low, high]": _interval(records)}
        | (SAMPLED if "sample" in stages else {})
        | (ONLINE if "rl" in stages else {})
        | (TRUST if "evaluate_reward" in stages else {})
        | {str(term): plain(meaning) for term, meaning in (own.items() if isinstance(own, dict) else ())}
    )


def _interval(records: Records) -> str:
    if len(records.seeds) > 1 and records.seed_rows:
        return f"Of the mean over {len(records.seeds)} seeds, from the summary; small dots are the seeds."
    return (
        "Of the mean over the n replies of the evaluation, as the evaluation gives it. It covers sampling, "
        "not training: another seed may end elsewhere."
    )


def _estimator(records: Records) -> str:
    named = [records.summary.get("kl_estimator"), *(run.result.get("kl_estimator") for run in records.runs)]
    found = list(dict.fromkeys(str(name) for name in named if name))
    return f"Estimator: {'; '.join(KL_ESTIMATORS.get(name, name) for name in found) or 'not recorded'}."
