"""What a reply is worth. This file is all that training knows about your task: change it, and another task is learnt.

klimb calls the function that recipe.yaml names with lists of the same length: the prompts, the model's completions, and
each further column of data.jsonl by its name (here: answer). It returns one number for each completion, or None where
it cannot tell: such a completion is left out. It runs in a process of its own; if it fails, klimb says in which line.
"""


def digits(completions, **columns):
    """The share of a reply's characters that are digits: a form, and so what an untrained model learns in a minute."""
    return [sum(c.isdigit() for c in text_of(reply)) / max(len(text_of(reply)), 1) for reply in completions]


def correct(completions, answer, **columns):
    """1 where the last number of the reply is the answer, else 0: for a model that can already speak."""
    return [float(last_number(text_of(reply)) == right) for reply, right in zip(completions, answer)]


def text_of(completion):
    """The prompts are messages, and so are the completions; with plain-text prompts a completion is a string."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


def last_number(text):
    words = "".join(c if c.isdigit() else " " for c in text).split()
    return words[-1] if words else None
