"""Models and tokenizers made from scratch: small, seeded, in the layout that transformers loads.

::

    tokenizer = word_tokenizer(["tea", "?", "it", "is", "hot"])
    make_model("model", tokenizer=tokenizer, architecture="gpt2", hidden=64, layers=2, heads=4, mlp=256,
               context=32, seed=0)
    AutoModelForCausalLM.from_pretrained("model"), AutoTokenizer.from_pretrained("model")
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

# Not qwen2: AutoTokenizer replaces whatever tokenizer such a directory holds with Qwen's own.
Architecture = Literal["llama", "gpt2", "mistral", "qwen3", "gemma2", "gemma3_text"]


class Specials(NamedTuple):
    """The control tokens. PAD is never EOS, so no mask can be guessed from token ids by accident."""

    pad: str = "<pad>"
    bos: str = "<bos>"
    eos: str = "<eos>"


SPECIALS = Specials()


def word_tokenizer(words: Sequence[str], specials: Specials = SPECIALS) -> PreTrainedTokenizerFast:
    """A word is a token: text is split at whitespace and decodes to words joined by one space.

    BOS goes in front of what is encoded, EOS is left to whoever knows where a text ends. A word that is not
    listed is an error when it is encoded, never an unknown token.
    """
    return _tokenizer(words, specials, pre_tokenizers.WhitespaceSplit(), decoder=None)


def character_tokenizer(characters: Sequence[str], specials: Specials = SPECIALS) -> PreTrainedTokenizerFast:
    """A character is a token, and text decodes to exactly itself; otherwise as `word_tokenizer`."""
    if long := [item for item in characters if len(item) != 1]:
        raise ValueError(f"a character tokenizer was given {long[0]!r}, which is not one character")
    each = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    return _tokenizer(list(characters), specials, each, decoder=decoders.Fuse())


def piece_tokenizer(texts: Iterable[str], size: int, specials: Specials = SPECIALS) -> PreTrainedTokenizerFast:
    """Byte-level BPE of at most `size` tokens, learnt from `texts`: reads any text, and decodes to exactly itself."""
    pieces = Tokenizer(models.BPE())
    pieces.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size - len(specials), initial_alphabet=alphabet, show_progress=False)
    pieces.train_from_iterator(texts, trainer)
    pieces.decoder = decoders.ByteLevel()
    return _finished(pieces, specials)


def make_model(
    directory: str | Path,
    *,
    tokenizer: PreTrainedTokenizerFast,
    architecture: Architecture,
    hidden: int,
    layers: int,
    heads: int,
    mlp: int,
    context: int,
    seed: int,
    tie: bool = False,
) -> Path:
    """Writes a causal language model with random weights, and its tokenizer, and returns the directory.

    `hidden` and `mlp` are widths, `context` the longest sequence in tokens; `tie` shares embedding and
    head. There is no dropout. The same arguments give the same bytes of weights, and torch's own random
    stream is left alone.
    """
    if architecture not in get_args(Architecture):
        known = ", ".join(get_args(Architecture))
        raise ValueError(f"architecture {architecture!r} is not one that can be made here: use one of {known}")
    if hidden % (2 * heads):
        raise ValueError(f"hidden={hidden} does not split into heads={heads} of even width: use a multiple")
    config = AutoConfig.for_model(
        architecture,
        vocab_size=len(tokenizer),
        tie_word_embeddings=tie,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        # The usual 0.02 suits widths in the thousands: narrow models learn far slower from there.
        initializer_range=hidden**-0.5,
        **_sizes(architecture, hidden, layers, heads, mlp, context),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    path = Path(directory)
    model.save_pretrained(path)
    tokenizer.model_max_length = context
    tokenizer.save_pretrained(path)
    return path


def _sizes(
    architecture: Architecture, hidden: int, layers: int, heads: int, mlp: int, context: int
) -> dict[str, int | float]:
    """The sizes under the names that the architecture's config gives them."""
    if architecture == "gpt2":
        return {
            "n_embd": hidden,
            "n_layer": layers,
            "n_head": heads,
            "n_inner": mlp,
            "n_positions": context,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
            "resid_pdrop": 0.0,
        }
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": hidden // heads,
        "intermediate_size": mlp,
        "max_position_embeddings": context,
    }


def _tokenizer(
    vocabulary: Sequence[str],
    specials: Specials,
    splitter: pre_tokenizers.PreTokenizer,
    decoder: decoders.Decoder | None,
) -> PreTrainedTokenizerFast:
    if clash := {*vocabulary} & {*specials}:
        raise ValueError(f"{min(clash)!r} is both a word and a special token: leave it out of the words")
    if len({*vocabulary}) < len(vocabulary):
        twice = next(item for item in vocabulary if vocabulary.count(item) > 1)
        raise ValueError(f"{twice!r} is listed twice: every word needs one id")
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(vocabulary)}))
    tokenizer.pre_tokenizer = splitter
    if decoder is not None:
        tokenizer.decoder = decoder
    return _finished(tokenizer, specials)


def _finished(tokenizer: Tokenizer, specials: Specials) -> PreTrainedTokenizerFast:
    # Not in the vocabulary of words, so that text encoded without the added tokens can never become one.
    tokenizer.add_special_tokens(list(specials))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{specials.bos} $A",
        special_tokens=[(specials.bos, tokenizer.token_to_id(specials.bos))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=specials.pad,
        bos_token=specials.bos,
        eos_token=specials.eos,
        clean_up_tokenization_spaces=False,
    )
