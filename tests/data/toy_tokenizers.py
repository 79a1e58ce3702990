"""Tokenizers of a few hundred tokens, trained on a few lines, and templates in the manner of known ones."""

from __future__ import annotations

import json
from functools import cache

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

LINES = [
    "user assistant system how are you today? I am well, thank you.",
    "The quick brown fox jumps over the lazy dog. 12 + 30 = 42",
    "def add(a, b):\n    return a + b\n\n\nprint(add(1, 2))",
    "Grüße aus Köln, 東京 and Москва 🎉",
] * 3

# The pattern of Llama 3, Qwen and others: line ends do not join the word behind them.
LINE_ENDS_APART = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATML_MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m['content'] }}<|im_end|>{% endif %}"
    "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + m['content'].strip() + ' [/INST]' }}{% elif m['role'] == 'assistant' %}"
    "{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}<start_of_turn>"
    "{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
PHI3 = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
QWEN3 = (
    "{% set ns = namespace(last=0) %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}{% set ns.last = loop.index0 %}{% endif %}"
    "{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
    "{% set content = m['content'].split('</think>')[-1].lstrip('\n') %}{% if loop.index0 > ns.last %}"
    "<think>\n{% if m['reasoning_content'] is defined %}{{ m['reasoning_content'] }}"
    "{% elif '</think>' in m['content'] %}"
    "{{ m['content'].split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') }}{% endif %}"
    "{{ '\n</think>\n\n' }}"
    "{% endif %}{{ content }}{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
DATED = "{{ strftime_now('%d %b %Y') }}\n" + CHATML


@cache
def _byte_level(special: tuple[str, ...], plain: tuple[str, ...] = ()) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        LINES,
        trainers.BpeTrainer(
            vocab_size=420,
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=list(special),
        ),
    )
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in plain])
    return tokenizer


def chatml(template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """PAD = EOS = <|im_end|>, no BOS; <think> is an ordinary added token."""
    special = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
    return PreTrainedTokenizerFast(
        tokenizer_object=_byte_level(special, ("<think>", "</think>")),
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>", "<|endoftext|>"],
        chat_template=template,
    )


def with_tokens(literals: list[str], template: str) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer in which the literals are tokens; those of thought are not special."""
    tokenizer = Tokenizer.from_str(_byte_level(("<s>", "</s>")).to_str())
    for literal in literals:
        thought = "think" in literal
        (tokenizer.add_tokens if thought else tokenizer.add_special_tokens)([AddedToken(literal, normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", chat_template=template
    )


def unregistered() -> PreTrainedTokenizerFast:
    """ChatML whose turn markers are added tokens, but not special ones."""
    return PreTrainedTokenizerFast(
        tokenizer_object=_byte_level(("</s>",), ("<|im_start|>", "<|im_end|>")),
        eos_token="</s>",
        chat_template=CHATML,
    )


def llama3(template: str | None = LLAMA3) -> PreTrainedTokenizerFast:
    """Adds BOS by itself; ends turns with another token than EOS."""
    special = (
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
    )
    tokenizer = Tokenizer.from_str(_byte_level(special).to_str())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LINE_ENDS_APART), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bos = tokenizer.token_to_id("<|begin_of_text|>")
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(
                single="<|begin_of_text|> $A",
                pair="<|begin_of_text|> $A <|begin_of_text|> $B",
                special_tokens=[("<|begin_of_text|>", bos)],
            ),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin_of_text|>",
        eos_token="<|end_of_text|>",
        additional_special_tokens=list(special[2:]),
        chat_template=template,
    )


def phi3() -> PreTrainedTokenizerFast:
    """Its special tokens swallow the white space behind them."""
    tokenizer = Tokenizer.from_str(_byte_level(("<|endoftext|>",)).to_str())
    names = ["<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]
    tokenizer.add_special_tokens([AddedToken(name, rstrip=True, normalized=False) for name in names])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", chat_template=PHI3)


@cache
def _sentencepiece(first: bool, special: tuple[str, ...]) -> Tokenizer:
    """Puts a space before a text (`first`, as Llama 2), or only replaces spaces (as Gemma)."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    if first:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
    strip = [decoders.Strip(" ", 1, 0)] if first else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    tokenizer.train_from_iterator(
        [word for line in LINES for word in line.split("\n")],
        trainers.BpeTrainer(
            vocab_size=620,
            show_progress=False,
            special_tokens=["<unk>", *special, *(f"<0x{byte:02X}>" for byte in range(256))],
            initial_alphabet=["▁"],
        ),
    )
    # Bytes are tokens of the model, not literals that a text could spell out.
    loaded = json.loads(tokenizer.to_str())
    loaded["added_tokens"] = [t for t in loaded["added_tokens"] if not t["content"].startswith("<0x")]
    return Tokenizer.from_str(json.dumps(loaded))


def llama2() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer.from_str(_sentencepiece(True, ("<s>", "</s>")).to_str())
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=LLAMA2
    )


def gemma() -> PreTrainedTokenizerFast:
    special = ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>")
    return PreTrainedTokenizerFast(
        tokenizer_object=_sentencepiece(False, special),
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=list(special[2:]),
        chat_template=GEMMA,
    )


def words(template: str | None = None) -> PreTrainedTokenizerFast:
    """A word is a token; the literal of a special token is in the vocabulary, and so a word, too."""
    names = ["<unk>", "<s>", "</s>", "tea", "is", "hot", "?", "very", "user", "assistant", ":"]
    tokenizer = Tokenizer(models.WordLevel({name: id for id, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=template,
    )


def normalising() -> PreTrainedTokenizerFast:
    """NFKC turns full-width letters into the literal of a special token, after which it is looked for."""
    tokenizer = Tokenizer.from_str(_byte_level(("<pad>",)).to_str())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.add_special_tokens([AddedToken("</s>", normalized=True, special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>")
