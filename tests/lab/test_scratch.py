from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from klimb.lab.scratch import Architecture, character_tokenizer, make_model, word_tokenizer

WORDS = ["tea", "?", "it", "is", "hot", "."]
SIZES = {"hidden": 32, "layers": 2, "heads": 4, "mlp": 48, "context": 16}


def weights(directory: Path) -> bytes:
    return (directory / "model.safetensors").read_bytes()


@pytest.mark.parametrize("architecture", get_args(Architecture))
@pytest.mark.parametrize("tie", [False, True])
def test_what_is_written_is_what_transformers_loads(tmp_path: Path, architecture: Architecture, tie: bool) -> None:
    tokenizer = word_tokenizer(WORDS)
    path = make_model(tmp_path / "m", tokenizer=tokenizer, architecture=architecture, seed=0, tie=tie, **SIZES)
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) is tie
    assert model.config.vocab_size == len(tokenizer) == len(WORDS) + 3
    assert model.dtype == torch.float32
    loaded = AutoTokenizer.from_pretrained(path)
    assert loaded.model_max_length == 16
    for text in ["tea ?", "it is hot . it is"]:
        # AutoTokenizer puts another tokenizer in the place of ours for some architectures, without a word.
        assert loaded(text).input_ids == tokenizer(text).input_ids
        assert loaded.decode(loaded(text).input_ids, skip_special_tokens=True) == text
    ids = torch.tensor([tokenizer("tea ? it is hot").input_ids])
    first, second = model(input_ids=ids).logits, model.train()(input_ids=ids).logits
    assert torch.isfinite(first).all()
    assert torch.equal(first, second), "dropout is on"


def test_parameters_are_counted_by_hand(tmp_path: Path) -> None:
    tokenizer = word_tokenizer(WORDS)
    sizes: dict[str, Any] = {"tokenizer": tokenizer, "seed": 0, **SIZES}
    v, d, m, t = len(WORDS) + 3, 32, 48, 16

    def count(path: Path) -> int:
        return sum(weight.numel() for weight in AutoModelForCausalLM.from_pretrained(path).parameters())

    # Per layer four projections of d x d, three of d x m and two norms; embedding, head, last norm. No
    # biases.
    llama = 2 * (4 * d * d + 3 * d * m + 2 * d) + 2 * v * d + d
    assert count(make_model(tmp_path / "llama", architecture="llama", **sizes)) == llama
    # Two matrices in the MLP, biases everywhere but in the head, norms with bias, learned positions.
    gpt2 = 2 * (4 * d * d + 4 * d + 2 * d * m + m + d + 4 * d) + 2 * v * d + t * d + 2 * d
    assert count(make_model(tmp_path / "gpt2", architecture="gpt2", **sizes)) == gpt2


def test_weights_follow_the_seed_alone(tmp_path: Path) -> None:
    def made(name: str, seed: int) -> bytes:
        tokenizer = word_tokenizer(WORDS)
        return weights(make_model(tmp_path / name, tokenizer=tokenizer, architecture="gpt2", seed=seed, **SIZES))

    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first = made("a", 0)
    assert torch.equal(torch.rand(3), expected), "torch's own stream was touched"
    assert made("b", 0) == first
    assert made("c", 1) != first


def test_specials_are_distinct_and_only_bos_is_added() -> None:
    tokenizer = word_tokenizer(WORDS)
    pad, bos, eos = tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id
    assert len({pad, bos, eos}) == 3
    tea, question = WORDS.index("tea"), WORDS.index("?")
    assert tokenizer("tea ?").input_ids == [bos, tea, question]
    assert tokenizer("tea ?", add_special_tokens=False).input_ids == [tea, question]
    assert tokenizer.decode([bos, tea, question, eos, pad], skip_special_tokens=True) == "tea ?"
    assert tokenizer(["tea ?", "tea"], padding=True).input_ids == [[bos, tea, question], [bos, tea, pad]]


@pytest.mark.parametrize("text", ["840/200=", "", " ", "1 2\n3  4", "= ="])
def test_characters_decode_to_exactly_the_text(text: str) -> None:
    tokenizer = character_tokenizer("0123456789/= \n")
    ids = tokenizer(text).input_ids
    assert len(ids) == 1 + len(text)
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_text_can_become_no_control_token_and_no_word_is_lost() -> None:
    for tokenizer in (word_tokenizer(WORDS), character_tokenizer("tea <os>")):
        vocabulary = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["vocab"]
        assert not {"<pad>", "<bos>", "<eos>"} & set(vocabulary)
        with pytest.raises(Exception, match="UNK"):
            tokenizer("lamp")
    with pytest.raises(Exception, match="UNK"):
        word_tokenizer(WORDS)("tea <eos>", split_special_tokens=True)


def test_what_cannot_be_made_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="listed twice"):
        word_tokenizer(["tea", "tea"])
    with pytest.raises(ValueError, match="both a word and a special"):
        word_tokenizer(["tea", "<eos>"])
    with pytest.raises(ValueError, match="not one character"):
        character_tokenizer(["a", "bc"])
    sizes: dict[str, Any] = {"tokenizer": word_tokenizer(WORDS), "seed": 0, **SIZES}
    with pytest.raises(ValueError, match="'t5' is not one"):
        make_model(tmp_path, architecture="t5", **sizes)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="hidden=36"):
        make_model(tmp_path, architecture="llama", **{**sizes, "hidden": 36})
    assert not list(tmp_path.iterdir())
