"""Where scores come from: functions, rules, weighted sums of them; and the scorer that keeps their failures
in check.
"""

from klimb.rewards.combine import Part, WeightedSum
from klimb.rewards.function import FunctionReward, from_callable, from_file
from klimb.rewards.protocol import Columns, Failure, FakeReward, Reward, Scores
from klimb.rewards.scorer import DryRun, Scorer, ScoreReport, dry_run
from klimb.rewards.spec import parse_reward, reward_files

__all__ = [
    "Columns",
    "DryRun",
    "Failure",
    "FakeReward",
    "FunctionReward",
    "Part",
    "Reward",
    "ScoreReport",
    "Scorer",
    "Scores",
    "WeightedSum",
    "dry_run",
    "from_callable",
    "from_file",
    "parse_reward",
    "reward_files",
]
