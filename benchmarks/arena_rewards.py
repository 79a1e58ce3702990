"""A control of the arena: right scores, dealt out to the wrong completions."""

import random
from typing import Any

from klimb.lab.countdown import solved


def shuffled(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """As many right as there are, but whose is chance: nothing can be learnt from it.

    The chance is that of the completions themselves, so that a run that was stopped goes on as it would have.
    """
    scores = solved(prompts, completions)
    random.Random("\n".join(completions)).shuffle(scores)
    return scores
