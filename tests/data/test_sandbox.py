"""Chat templates that do not end, grow without bound or reach into Python: one clear error each, in bounded time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import toy_tokenizers as toy

from klimb.data import sandbox
from klimb.data.load import load_examples
from klimb.data.render import Renderer
from klimb.data.template import RenderError
from klimb.errors import DataError

ROWS = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}] * 2000
TIMES_99 = "{% set ns = namespace(x='ab') %}{% for a in range(99) %}"
NESTS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
ENDLESS = {
    "loops": NESTS,
    "a loop that keeps nothing": "{% for a in range(99999) if range(99999) | sum < 0 %}{% endfor %}",
    "a macro that calls itself twice": (
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(99) }}"
    ),
    "a text that doubles": TIMES_99 + "{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "a sum that doubles": TIMES_99 + "{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "a long text": "{{ 'a' * 10000000000 }}",
    "a wide text": "{{ 'a' | center(10000000000) }}",
    "a wide text by a method": "{{ 'a'.ljust(10000000000) }}",
    "much output": "{% for a in range(99999) %}{{ 'x' * 100000 }}{% endfor %}",
    "filters over filters": "{% for x in range(99999) %}{{ range(99999) | map('string') | join }}{% endfor %}",
}


@pytest.mark.parametrize("program", ENDLESS.values(), ids=ENDLESS)
def test_a_template_that_does_not_end_is_stopped(program: str) -> None:
    start = time.thread_time()
    with pytest.raises(DataError, match="the chat template does not end: 1,000,000 steps") as said:
        load_examples(ROWS, Renderer(toy.chatml(program + toy.CHATML)), on_bad="drop")
    # Once and not for each row; three seconds on an idle core, of which the bound leaves a multiple.
    assert time.thread_time() - start < 30
    assert "\n" not in str(said.value)


def test_also_in_threads_and_each_has_steps_of_its_own() -> None:
    ended: list[str] = []

    def run(program: str, ends: Callable[[Any], None]) -> None:
        try:
            ends(Renderer(toy.chatml(program + toy.CHATML)).prompt([{"role": "user", "content": "a"}]))
        except DataError as error:
            ended.append(str(error))

    threads = [threading.Thread(target=run, args=(program, lambda _: ended.append("fine"))) for program in (NESTS, "")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert sorted(text[:26] for text in ended) == ["fine", "the chat template does not"]


def test_steps_do_not_add_up_over_renderings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "STEPS", 2000)
    template = Renderer(toy.chatml("{% for a in range(900) %}{% endfor %}" + toy.CHATML)).template
    rendered = [template.render(ROWS[0]["messages"]) for _ in range(5)]
    assert rendered == [rendered[0]] * 5
    assert ROWS[0]["messages"][0]["content"] in rendered[0][0]


def test_long_conversations_and_contents_are_no_endless_template() -> None:
    """Templates look at each message from each: that is half a million turns here."""
    looking_back = "{% for m in messages %}{% for n in messages %}{% endfor %}{% endfor %}" + toy.CHATML
    messages = [{"role": role, "content": "x" * 1000} for role in ("user", "assistant")] * 350
    assert len(Renderer(toy.chatml(looking_back)).template.render(messages)[0]) > 700_000
    big = [{"role": "user", "content": "x" * 5_000_000}]
    assert len(Renderer(toy.chatml()).template.render(big)[0]) > 5_000_000


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("{{ ''.__class__.__mro__ }}", "access to attribute '__class__' of 'str' object is unsafe"),
        ("{{ messages.append(1) }}", "access to attribute 'append' of 'list' object is unsafe"),
        ("{{ range(999999999) }}", "Range too big"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "maximum recursion depth exceeded"),
        ("{% include 'x' %}", "no loader for this environment"),
        ("{{ raise_exception('not today') }}", "not today"),
        ("{% for %}", "Expected an expression"),
    ],
)
def test_a_template_that_may_not_or_cannot_is_an_error_of_the_model_and_not_of_rows(program: str, said: str) -> None:
    tokenizer = toy.chatml(program + toy.CHATML)
    tokenizer.name_or_path = "a-model"
    with pytest.raises(RenderError, match=r"^a-model: the chat template refuses the conversation: ") as error:
        load_examples(ROWS, Renderer(tokenizer), on_bad="drop")
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_template_that_drops_turns_is_refused_row_by_row() -> None:
    last_alone = toy.CHATML.replace("for m in messages", "for m in messages[-1:]")
    with pytest.raises(DataError, match="none of the 2000 rows can be used, for one reason: the chat template"):
        load_examples(ROWS, Renderer(toy.chatml(last_alone)), on_bad="drop")


def test_what_templates_are_given_beside_jinja_is_there() -> None:
    program = (
        "{{ strftime_now('%Y')[:0] }}{% set d = dict(a=1) %}{{ d | tojson(indent=2) | length * 0 }}"
        "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{% break %}{% endfor %}"
    )
    plain = Renderer(toy.chatml("0" + toy.CHATML)).template.render(ROWS[0]["messages"])
    assert Renderer(toy.chatml(program + toy.CHATML)).template.render(ROWS[0]["messages"]) == plain
