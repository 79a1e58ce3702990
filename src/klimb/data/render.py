"""Texts → tokens and a mask: the one rendering path for training, sampling and evaluation."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import repeat
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from klimb.data.encode import Encoded, Encoder
from klimb.data.template import ChatTemplate, Content, RenderError, Written, any_of
from klimb.types import Message, Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")
Tools = list[dict[str, Any]] | None
"""What a row's conversation may call, as JSON schemas, for the chat template to print."""
TOOL_SETS = 256


class Tokens(NamedTuple):
    """A prompt, and what follows it; `mask` is True for the tokens of `completion` that are trained on."""

    prompt: list[int]
    completion: list[int]
    mask: list[bool]


class Renderer:
    """How texts become tokens for one tokenizer.

    Strings are taken as they are: BOS if the tokenizer adds one, the prompt, the completion, EOS. Messages go
    through the chat template, with `system` put before those that have no system message, and `options` for
    the template (as `enable_thinking`). Methods in the plural take many, each with its tools where it has
    some, with an error in the place of each that failed.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, system: str | None = None, **options: Any) -> None:
        self.tokenizer = tokenizer
        self.system = system
        self._options = options
        self._encoder = Encoder(tokenizer)
        self._with_tools: dict[str, ChatTemplate] = {}
        self._bos, self._eos = tokenizer.bos_token_id, tokenizer.eos_token_id

    @property
    def identity(self) -> str:
        """A hash of all but the code that decides how texts become tokens."""
        tokenizer = self.tokenizer
        named = [tokenizer.special_tokens_map, sorted(tokenizer.all_special_ids), self._encoder.prefix]
        how = [tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template, self.system, self._options]
        return hashlib.sha256(json.dumps([named, how], sort_keys=True, default=str).encode()).hexdigest()

    @property
    def template(self) -> ChatTemplate:
        """Its `source` is what a model trained on conversations has to be saved with. Raises RenderError."""
        if isinstance(self._template, RenderError):
            raise RenderError(str(self._template))
        return self._template

    @cached_property
    def _template(self) -> ChatTemplate | RenderError:
        special = [self._encoder.literals[id] for id in self._encoder.special]
        return _attempt(ChatTemplate, self.tokenizer, self._encoder.added, special, self._options)

    # --- one text ----------------------------------------------------------------------------------------

    def prompt(self, text: Text) -> list[int]:
        """The tokens that the model continues: for messages, up to the start of the assistant's turn."""
        return _only(self.prompts([text]))

    def completion(self, prompt: Text, completion: Text) -> Tokens:
        """`prompt` as above, and the completion with its end token; trained on the assistant's part."""
        return _only(self.completions([(prompt, completion)]))

    def conversation(self, messages: list[Message]) -> Tokens:
        """Trained on every assistant message; the prompt is all before the first of them."""
        return _only(self.conversations([messages]))

    def document(self, text: str) -> Tokens:
        """Trained on everything but the first token, which nothing predicts."""
        return _only(self.documents([text]))

    # --- many --------------------------------------------------------------------------------------------

    def prompts(self, texts: Sequence[Text], tools: Sequence[Tools] | None = None) -> list[list[int] | RenderError]:
        conversational = _conversational(texts)
        written = [_attempt(self._write_prompt, *each) for each in zip(texts, tools or repeat(None))]
        encoded = self._encoded(written, conversational)
        return [_attempt(self._prompt_tokens, item, conversational) for item in encoded]

    def completions(
        self, pairs: Sequence[tuple[Text, Text]], tools: Sequence[Tools] | None = None
    ) -> list[Tokens | RenderError]:
        written = [_attempt(self._write_completion, *pair, each) for pair, each in zip(pairs, tools or repeat(None))]
        return self._tokens(written, _conversational([prompt for prompt, _ in pairs]))

    def conversations(
        self, conversations: Sequence[list[Message]], tools: Sequence[Tools] | None = None
    ) -> list[Tokens | RenderError]:
        each = zip(conversations, tools or repeat(None))
        return self._tokens([_attempt(self._write_conversation, *pair) for pair in each], True)

    def documents(self, texts: Sequence[str]) -> list[Tokens | RenderError]:
        whole = [Written(text, [Content(0, len(text), True)], [(0, len(text))]) for text in texts]
        return self._tokens(whole, False)

    # --- back --------------------------------------------------------------------------------------------

    def stop_tokens(self, conversational: bool) -> frozenset[int]:
        """The ids that end a completion: training trains them, sampling has to stop at them."""
        end = {self._encoder.added[self.template.end]} if conversational else set()
        return frozenset(end | ({self._eos} - {None}))

    def decode(self, tokens: Sequence[int], like: Text) -> Text:
        """A completion as a reward function reads it: in the form of its prompt, without control tokens."""
        control, _ = self._control(isinstance(like, list))
        text = self._encoder.decode([token for token in tokens if token not in control])
        return text if isinstance(like, str) else [{"role": "assistant", "content": text}]

    def control_string(self, text: Text) -> str | None:
        """The first control token that is spelled out in the text, where it will be read as plain text."""
        pattern = self._spelled_out if isinstance(text, str) else self._spelled_out_in_chat
        contents = [text] if isinstance(text, str) else [message["content"] for message in text]
        return next((match[0] for part in contents if (match := pattern.search(part))), None)

    @cached_property
    def _spelled_out(self) -> re.Pattern[str]:
        return re.compile(any_of([self._encoder.literals[id] for id in self._encoder.special]))

    @cached_property
    def _spelled_out_in_chat(self) -> re.Pattern[str]:
        return re.compile(any_of(self.template.control))

    # --- text --------------------------------------------------------------------------------------------

    def _chat(self, tools: Tools) -> ChatTemplate:
        """The template with a row's tools in it, kept for the rows that bring the same."""
        if not tools:
            return self.template
        key = json.dumps(tools, sort_keys=True)
        if key not in self._with_tools:
            if len(self._with_tools) >= TOOL_SETS:
                self._with_tools.clear()
            self._with_tools[key] = self.template.with_tools(tools)
        return self._with_tools[key]

    def _write_prompt(self, text: Text, tools: Tools = None) -> Written:
        if isinstance(text, str):
            return Written(text, [Content(0, len(text), False)])
        return self._chat(tools).asked(self._with_system(text))

    def _write_completion(self, prompt: Text, completion: Text, tools: Tools = None) -> Written:
        if isinstance(prompt, str) and isinstance(completion, str):
            border, end = len(prompt), len(prompt) + len(completion)
            if border == end:
                raise RenderError("the completion is empty")
            contents = [Content(0, border, False), Content(border, end, True)]
            return Written(prompt + completion, contents, [(border, end)], [border])
        if isinstance(prompt, str) or isinstance(completion, str):
            raise RenderError("the prompt and the completion have to be both strings or both messages")
        return self._chat(tools).answered(self._with_system(prompt), completion)

    def _write_conversation(self, messages: list[Message], tools: Tools = None) -> Written:
        messages = self._with_system(messages)
        roles = [message["role"] for message in messages]
        if "assistant" not in roles:
            raise RenderError("there is no assistant message to train on")
        first = roles.index("assistant")
        return self._chat(tools).answered(messages[:first], messages[first:])

    def _with_system(self, messages: list[Message]) -> list[Message]:
        if self.system is None or any(message["role"] == "system" for message in messages):
            return messages
        return [{"role": "system", "content": self.system}, *messages]

    # --- tokens ------------------------------------------------------------------------------------------

    def _control(self, conversational: bool) -> tuple[frozenset[int], frozenset[int]]:
        """Ids that no content may become, and further ones that only the assistant's may (as <think>)."""
        return self._chat_control if conversational else (self._encoder.special, frozenset())

    @cached_property
    def _chat_control(self) -> tuple[frozenset[int], frozenset[int]]:
        added = self._encoder.added
        control = frozenset(added[literal] for literal in self.template.control)
        return control, frozenset(id for literal, id in added.items() if literal in self.template.source)

    def _encoded(self, written: Sequence[Written | RenderError], conversational: bool) -> list[Encoded | RenderError]:
        good = [item for item in written if isinstance(item, Written)]
        if not good:
            return [item for item in written if isinstance(item, RenderError)]
        encoded = iter(self._encoder.encode(good, *self._control(conversational), offsets=conversational))
        return [next(encoded) if isinstance(item, Written) else item for item in written]

    def _tokens(self, written: Sequence[Written | RenderError], conversational: bool) -> list[Tokens | RenderError]:
        encoded = self._encoded(written, conversational)
        return [_attempt(self._split, item, ids, conversational) for item, ids in zip(written, encoded)]

    def _prompt_tokens(self, encoded: Encoded, conversational: bool) -> list[int]:
        tokens = encoded.ids if conversational else [*self._encoder.prefix, *encoded.ids]
        self._check_prompt(tokens)
        return tokens

    def _split(self, written: Written, encoded: Encoded, conversational: bool) -> Tokens:
        """Prompt | completion, with the mask; what follows the last trained token is left out."""
        ids, mask = list(encoded.ids), [False] * len(encoded.ids)
        for start, end in written.trained:
            first, last = encoded.index(start), encoded.index(end)
            mask[first:last] = [True] * (last - first)
            if conversational:
                self._check_end(ids, last)
            elif first == last:
                raise RenderError("the completion is empty", why="the tokenizer makes no token of it")
        border = encoded.index(written.cuts[0]) if written.cuts else 0
        if not conversational:
            if self._eos is None:
                raise RenderError("the tokenizer has no EOS token to end a completion with", fix="set its eos_token")
            ids, mask = [*self._encoder.prefix, *ids, self._eos], [*mask, True]
            mask = [False] * len(self._encoder.prefix) + mask
            border += len(self._encoder.prefix)
        if not written.cuts:
            border = max(border, 1)
        end = len(mask) - mask[::-1].index(True) if True in mask else 0
        self._check_prompt(ids[:border])
        if end <= border:
            raise RenderError("there is no token to train on")
        return Tokens(ids[:border], ids[border:end], mask[border:end])

    def _check_prompt(self, prompt: list[int]) -> None:
        if not prompt:
            raise RenderError("the prompt has no tokens, so nothing predicts the first of the completion")
        if prompt[:2] == [self._bos] * 2:
            raise RenderError("the prompt starts with two BOS tokens", fix="let the chat template write one")

    def _check_end(self, ids: list[int], after: int) -> None:
        """A trained span ends before token `after`."""
        end, fix = self._encoder.added[self.template.end], "use another chat template"
        if not after or ids[after - 1] != end:
            raise RenderError("the end of the assistant's turn is not trained", fix=fix)
        if ids[after : after + 1] == [end]:
            raise RenderError("the assistant's turn ends with two end tokens", fix=fix)


def _conversational(texts: Sequence[Text]) -> bool:
    forms = {not isinstance(text, str) for text in texts}
    if len(forms) > 1:
        raise RenderError("strings and messages cannot be rendered together")
    return True in forms


def _attempt(function: Callable[..., T], *arguments: Any) -> T | RenderError:
    """The result, or the error: that of an earlier step if there was one."""
    for argument in arguments:
        if isinstance(argument, RenderError):
            return argument
    try:
        return function(*arguments)
    except RenderError as error:
        return error


def _only(results: list[T | RenderError]) -> T:
    [result] = results
    if isinstance(result, RenderError):
        raise result
    return result
