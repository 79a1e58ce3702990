"""What reward models learn from beside comparisons: rankings, ratings by attribute, steps, and verdicts in words."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from klimb.data.checks import CHECKS
from klimb.data.feedback import LABELS
from klimb.data.kinds import Kind, OnBad, Record
from klimb.data.load import Options, Progress, Task, Transcripts, check_length, content_of, load_task, tools_of
from klimb.data.render import Renderer, Tokens
from klimb.data.report import Loaded
from klimb.data.source import BadRow, Source
from klimb.data.template import RenderError
from klimb.errors import DataError
from klimb.types import Judged, Labelled, Text

VERDICTS = ("Yes", "No")


def load_judged(
    task: Callable[[Renderer], Task[Any]],
    source: Source,
    renderer: Renderer,
    *,
    max_length: int | None = None,
    columns: Mapping[str, str] | None = None,
    on_bad: OnBad = "error",
    transcripts: Transcripts = "text",
    cache: bool = False,
    progress: Progress | None = None,
) -> Loaded[Any]:
    """`Judged` items, of verdicts `Labelled` ones. task: one of those below, all else as in `load_prompts`."""
    options = Options(max_length, columns or {}, on_bad, transcripts, cache, progress)
    return load_task(task(renderer), source, renderer, options)


# --- several completions of a prompt ----------------------------------------------------------------------


def rankings(renderer: Renderer) -> Task[Judged]:
    """Completions of one prompt, each with its score. Raises BadRow where all are alike."""
    return Task(Judged, ("ranking",), _render_rankings, content_of, _ranking)


def _render_rankings(renderer: Renderer, kind: Kind, records: list[Record]) -> list[Any]:
    asked = [(r.values["prompt"], reply_to(r.values["prompt"], c)) for r in records for c in r.values["completions"]]
    tools = [tools for record, tools in zip(records, tools_of(records)) for _ in record.values["completions"]]
    each = iter(renderer.completions(asked, tools))
    rendered = [[next(each) for _ in record.values["completions"]] for record in records]
    return [next((side for side in sides if isinstance(side, RenderError)), sides) for sides in rendered]


def _ranking(record: Record, sides: list[Tokens], id: str, limit: int | None) -> Judged:
    scores = record.values["scores"]
    if len(set(scores)) < 2:
        raise BadRow("scores are all the same, so that no completion is better than another")
    check_length("the row", len(sides[0].prompt) + max(len(side.completion) for side in sides), limit)
    tokens = [token for side in sides for token in side.completion]
    return Judged(id, sides[0].prompt, tokens, [len(side.completion) for side in sides], scores)


def reply_to(prompt: Text, completion: str) -> Text:
    """In the form of its prompt."""
    return completion if isinstance(prompt, str) else [{"role": "assistant", "content": completion}]


# --- attributes -------------------------------------------------------------------------------------------


RATED: tuple[Kind, ...] = ("prompt-completion", "labelled")


def ratings(names: Sequence[str]) -> Callable[[Renderer], Task[Judged]]:
    """A completion with a number in a column for each of the names."""

    def build(record: Record, tokens: Tokens, id: str, limit: int | None) -> Judged:
        check_length("the row", len(tokens.prompt) + len(tokens.completion), limit)
        values = ratings_of(record, names)
        return Judged(id, tokens.prompt, tokens.completion, [len(tokens.completion)], values)

    content = rated_content(names)
    return lambda renderer: Task(Judged, RATED, _render_replies, content, build, details=("ratings", *names))


def levels(name: str) -> Callable[[Renderer], Task[Judged]]:
    """A completion with a whole number in the column, the better the higher."""

    def task(renderer: Renderer) -> Task[Judged]:
        rated = ratings([name])(renderer)

        def build(record: Record, tokens: Tokens, id: str, limit: int | None) -> Judged:
            item = rated.build(record, tokens, id, limit)
            assert isinstance(item, Judged)
            if not item.values[0].is_integer():
                raise BadRow(f"{name} is {item.values[0]:g}, not a whole number: it has to be one of ordered levels")
            return item

        return replace(rated, build=build, details=("levels", name))

    return task


def ratings_of(record: Record, names: Sequence[str]) -> list[float]:
    given = {**record.columns, **record.values}
    if missing := [name for name in names if given.get(name) is None]:
        raise BadRow(f"has no column of ratings {missing[0]} (it has: {', '.join(map(str, given))})")
    return list(CHECKS["scores"]([given[name] for name in names], "ratings"))


def rated_content(names: Sequence[str]) -> Callable[[Record], Any]:
    return lambda record: [content_of(record), [record.columns.get(name) for name in names]]


def _render_replies(renderer: Renderer, kind: Kind, records: list[Record]) -> list[Any]:
    texts = [(record.values["prompt"], record.values["completion"]) for record in records]
    return list(renderer.completions(texts, tools_of(records)))


# --- steps ------------------------------------------------------------------------------------------------


class StepEnds:
    """Finds the last token of every step in a run of tokens, without ever reading the text anew.

    A step ends with the token that completes the separator (white space around a separator of words does not count),
    the last one where the run ends; what has no text but separators is no step of its own.
    """

    def __init__(self, renderer: Renderer, separator: str) -> None:
        self._tokenizer, self._mark = renderer.tokenizer, separator.strip() or separator
        self._texts: dict[int, str] = {}

    def __call__(self, tokens: Sequence[int]) -> list[bool]:
        ends, text = [False] * len(tokens), ""
        for place, token in enumerate(tokens):
            text += self._text(token)
            before, found, behind = text.rpartition(self._mark)
            if found:
                ends[place] = bool(before.replace(self._mark, "").strip())
                text = behind
        if tokens and (text.strip() or True not in ends):
            ends[-1] = True
        return ends

    def _text(self, token: int) -> str:
        if token not in self._texts:
            text = self._tokenizer.decode([token], skip_special_tokens=True, clean_up_tokenization_spaces=False)
            self._texts[token] = str(text)
        return self._texts[token]


def steps(separator: str) -> Callable[[Renderer], Task[Judged]]:
    """A solution as its steps, which the separator stands between. Raises BadRow where its tokens do not show them."""

    def render(renderer: Renderer, kind: Kind, records: list[Record]) -> list[Any]:
        rows = [record.values for record in records]
        texts = [(row["prompt"], reply_to(row["prompt"], separator.join(row["completions"]))) for row in rows]
        return list(renderer.completions(texts, tools_of(records)))

    def task(renderer: Renderer) -> Task[Judged]:
        ends_of = StepEnds(renderer, separator)

        def build(record: Record, tokens: Tokens, id: str, limit: int | None) -> Judged:
            check_length("the row", len(tokens.prompt) + len(tokens.completion), limit)
            ends = [place + 1 for place, end in enumerate(ends_of(tokens.completion)) if end]
            labels = record.values["labels"]
            if len(ends) != len(labels):
                raise BadRow(f"has {len(labels)} steps, but {len(ends)} when its text is split at {separator!r}")
            lengths = [end - start for start, end in zip([0, *ends], ends)]
            return Judged(id, tokens.prompt, tokens.completion, lengths, list(map(float, labels)))

        return Task(Judged, ("steps",), render, content_of, build, details=("steps", separator))

    return task


# --- verdicts in words ------------------------------------------------------------------------------------


def question(prompt: Text, completion: Text, instruction: str) -> tuple[Text, Text]:
    """A prompt, and its completion with the question whether it is right; of messages with an answer behind it."""
    if isinstance(prompt, str) or isinstance(completion, str):
        return prompt, f"{completion}{instruction}"
    asked = [{"role": "user", "content": instruction}, {"role": "assistant", "content": VERDICTS[0]}]
    return prompt, [*completion, *asked]


def up_to_verdict(tokens: Tokens, conversational: bool) -> list[int]:
    """The completion of a question's tokens as far as the verdict: a string's end token goes, too."""
    end = len(tokens.completion)
    if not conversational:
        return tokens.completion[: end - 1]
    while end and tokens.mask[end - 1]:
        end -= 1
    return tokens.completion[:end]


def verdict_tokens(renderer: Renderer, instruction: str, conversational: bool) -> tuple[int, int]:
    """The first tokens of "Yes" and "No" behind the question. Raises DataError where they are the same."""
    asked: Text = [{"role": "user", "content": instruction}] if conversational else instruction
    yes, no = (renderer.completion(asked, reply_to(asked, verdict)).completion[0] for verdict in VERDICTS)
    if yes == no:
        raise DataError("the tokenizer begins Yes and No with the same token", where=f"token {yes}",
                        fix="use another model, or kind=labels")  # fmt: skip
    return yes, no


def verdicts(instruction: str) -> Callable[[Renderer], Task[Labelled]]:
    """Rows with a label, and both sides of pairs: the question, and as its last token the verdict, which is trained."""

    def sides_of(record: Record) -> list[tuple[Text, bool]]:
        row = record.values
        if "label" in row:
            return [(row["completion"], row["label"])]
        return [(row["chosen"], True), (row["rejected"], False)]

    def render(renderer: Renderer, kind: Kind, records: list[Record]) -> list[Any]:
        asked = [
            question(record.values["prompt"], text, instruction) for record in records for text, _ in sides_of(record)
        ]
        tools = [tools for record, tools in zip(records, tools_of(records)) for _ in sides_of(record)]
        each = iter(renderer.completions(asked, tools))
        rendered = [[next(each) for _ in sides_of(record)] for record in records]
        return [next((side for side in sides if isinstance(side, RenderError)), sides) for sides in rendered]

    def task(renderer: Renderer) -> Task[Labelled]:
        def build(record: Record, sides: list[Tokens], id: str, limit: int | None) -> list[Labelled]:
            conversational = not isinstance(record.values["prompt"], str)
            verdict = verdict_tokens(renderer, instruction, conversational)
            made = []
            for number, (tokens, (_, label)) in enumerate(zip(sides, sides_of(record), strict=True)):
                asked = up_to_verdict(tokens, conversational)
                check_length("the row", len(tokens.prompt) + len(asked) + 1, limit)
                mask = [False] * len(asked) + [True]
                own = f"{int(id, 16) ^ number:016x}"
                made.append(Labelled(own, tokens.prompt, [*asked, verdict[0 if label else 1]], mask, label))
            return made

        return Task(Labelled, LABELS.kinds, render, content_of, build, details=("verdicts", instruction))

    return task
