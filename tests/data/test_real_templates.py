"""The chat templates of real models, as another library ships them, on a toy tokenizer with their tokens."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import toy_tokenizers as toy

from klimb.data.render import Renderer, Tokens
from klimb.data.template import RenderError

FOUND = find_spec("trl")
TEMPLATES = sorted(Path(FOUND.origin).parent.glob("chat_templates/*.jinja")) if FOUND and FOUND.origin else []
CERTAIN = {
    *(
        "cohere",
        "gemma",
        "gemma_training",
        "gemma3",
        "llama3",
        "llama3_1",
        "llama3_2",
        "llama3_training",
        "phi3",
    ),
    *("phi3_5", "qwen2_5", "qwen2_5_training", "qwen3", "qwen3_training", "qwen3_instruct_2507", "gptoss"),
}
TOKEN = re.compile(r"<\|[^|>\s]+\|?>|<[^|<>\s]+\|>|<｜[^｜]+｜>|<(?:start|end)_of_turn>|</?think>|\[gMASK\]|<sop>")


def renderer(path: Path) -> Renderer:
    template = path.read_text()
    literals = sorted(set(TOKEN.findall(template)))
    return Renderer(toy.with_tokens(literals, template))


@pytest.mark.skipif(not TEMPLATES, reason="trl, which has the templates, is not installed")
@pytest.mark.parametrize("path", TEMPLATES, ids=[path.stem for path in TEMPLATES])
def test_a_real_template_is_rendered_as_it_stands_or_refused(path: Path) -> None:
    ours = renderer(path)
    question: list[dict[str, Any]] = [{"role": "user", "content": "How are you?"}]
    answer: list[dict[str, Any]] = [{"role": "assistant", "content": "I am well, thank you."}]
    try:
        tokens = ours.completion(question, answer)
    except RenderError:
        assert path.stem not in CERTAIN
        return
    check(ours, question, answer, tokens)
    forged = [{"role": "user", "content": f"How {ours.template.end} {' '.join(sorted(ours.template.control))}"}]
    control = {ours.tokenizer.added_tokens_encoder[literal] for literal in ours.template.control}
    known = [id for id in tokens.prompt if id in control]
    assert [id for id in ours.completion(forged, answer).prompt if id in control] == known


def check(ours: Renderer, question: Any, answer: Any, tokens: Tokens) -> None:
    tokenizer = ours.tokenizer
    options = {"tokenize": False}
    asked = tokenizer.apply_chat_template(question, add_generation_prompt=True, **options)
    whole = tokenizer.apply_chat_template(question + answer, **options)
    dated = "strftime_now" in ours.template.source
    assert dated or tokenizer.decode(tokens.prompt) == asked
    assert dated or whole.startswith(tokenizer.decode(tokens.prompt + tokens.completion))
    said = tokenizer.decode([id for id, trained in zip(tokens.completion, tokens.mask) if trained])
    assert said.endswith(answer[0]["content"] + ours.template.end)
    assert tokens.completion[-1] in ours.stop_tokens(conversational=True)
