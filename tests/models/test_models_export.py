"""What a run leaves in `model/`, read by transformers and peft alone: the numbers that klimb had in memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from world import SMALL_RL, WORDS, Played, World, make_world, play, write

from klimb.batch import Row, TokenBatch
from klimb.errors import RunError
from klimb.lab.scratch import make_model, word_tokenizer
from klimb.models.faces import RewardModel, policy_logps, reward_scores
from klimb.stages import reward as reward_stage
from klimb.stages.models import Loaded

LORA = {"rank": 4, "alpha": 8.0}
CHATML = (
    "{% for m in messages %}<|im_start|> {{ m['role'] }} {{ m['content'] }} <|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)
TOLERANCE = 1e-5  # fp32: padded attention instead of packed, log-probs down to −10


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


def texts(tokenizer: PreTrainedTokenizerBase) -> TokenBatch:
    """Ragged replies, each ending in EOS; one without a prompt but its BOS."""
    ids: Callable[[str], list[int]] = lambda text: tokenizer.convert_tokens_to_ids(text.split())  # noqa: E731
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    pairs = [("a ?", "it is so"), ("b b ?", "yes"), ("", "no it is a so"), ("c d e ?", "is it ?")]
    rows = [[Row([bos, *ids(p)], [*ids(c), eos], [True] * (len(c.split()) + 1))] for p, c in pairs]
    return TokenBatch.from_rows(rows, range(len(rows)), [p for p, _ in pairs])


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Log-probs of `texts` by the policy in memory, at the moment it is saved."""
    found: list[Tensor] = []
    save = Loaded.save

    def keep_and_save(self: Loaded, directory: Path) -> None:
        found.append(policy_logps(self.policy, texts(self.renderer.tokenizer), budget=1000).logps)
        save(self, directory)

    monkeypatch.setattr(Loaded, "save", keep_and_save)
    return found


def padded(tokenizer: PreTrainedTokenizerBase) -> dict[str, Tensor]:
    lines = [[*row.prompt, *row.completion] for (row,) in texts(tokenizer).rows]
    tokenizer.padding_side = "right"
    return dict(tokenizer.pad({"input_ids": lines}, return_tensors="pt"))


@torch.no_grad()
def their_logps(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """[B, T] by the model's own padded forward."""
    batch, inputs = texts(tokenizer), padded(tokenizer)
    logps = model(**inputs).logits.float().log_softmax(-1)
    chosen = logps[:, :-1].gather(2, inputs["input_ids"][:, 1:, None]).squeeze(2)
    grid = torch.zeros(batch.mask.shape)
    for i, (row,) in enumerate(batch.rows):
        start = len(row.prompt) - 1
        grid[i, : len(row.completion)] = chosen[i, start : start + len(row.completion)]
    return grid


def sft(world: World, out: Path, model: str = "", **values: Any) -> Played:
    return play("sft", out, model=model or world.model, data=values.pop("data", world.demonstrations), steps=8,
                batch_size=8, **values)  # fmt: skip


# Policies -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gemma2"])
@pytest.mark.parametrize("tie", [True, False])
def test_a_policy_is_loaded_with_the_log_probs_that_it_was_trained_to(
    architecture: Any, tie: bool, world: World, kept: list[Tensor], tmp_path: Path
) -> None:
    base = make_model(tmp_path / "base", tokenizer=word_tokenizer(WORDS), architecture=architecture, hidden=16,
                      layers=2, heads=2, mlp=32, context=24, seed=0, tie=tie)  # fmt: skip
    done = sft(world, tmp_path / "sft", str(base))
    tokenizer = AutoTokenizer.from_pretrained(done.model)
    model = AutoModelForCausalLM.from_pretrained(done.model).eval()
    assert model.config._attn_implementation != "klimb"
    found = their_logps(model, tokenizer)
    assert (found - kept[0]).abs().max() < TOLERANCE
    before = their_logps(AutoModelForCausalLM.from_pretrained(base).eval(), tokenizer)
    assert (found - before).abs().max() > 0.1  # it did learn something
    shared = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert shared == tie
    stored = load_file(Path(done.model) / "model.safetensors")
    assert ("lm_head.weight" in stored) == (not tie)


def test_after_ppo_the_policy_is_saved_without_its_critic(world: World, kept: list[Tensor], tmp_path: Path) -> None:
    done = play("rl", tmp_path / "rl", model=world.model, data=world.prompts, reward=world.reward("count"), steps=2,
                algorithm="ppo", updates_per_step=2, critic={"optimizer": {"lr": 0.01}}, **SMALL_RL)  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(done.model).eval()
    found = their_logps(model, AutoTokenizer.from_pretrained(done.model))
    assert (found - kept[0]).abs().max() < TOLERANCE
    stored, base = (load_file(Path(folder) / "model.safetensors") for folder in (done.model, world.model))
    assert stored.keys() == base.keys()


def test_a_policy_in_bfloat16_is_saved_as_it_computes(world: World, kept: list[Tensor], tmp_path: Path) -> None:
    done = sft(world, tmp_path / "sft", dtype="bfloat16")
    model = AutoModelForCausalLM.from_pretrained(done.model).eval()
    assert model.dtype == torch.bfloat16
    found = their_logps(model, AutoTokenizer.from_pretrained(done.model))
    assert (found - kept[0]).abs().max() < 0.1  # 8 bits, another order of sums; log-probs down to −10


@pytest.mark.parametrize("stage", ["sft", "rl", "preference"])
def test_an_adapter_is_loaded_by_peft_from_anywhere(
    stage: str, world: World, kept: list[Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft import AutoPeftModelForCausalLM, PeftModel

    monkeypatch.chdir(world.folder)  # the base is named as people name it: relative to where they stand
    base = Path(world.model).name
    if stage == "sft":
        done = sft(world, tmp_path / "run", base, lora=LORA)
    elif stage == "rl":
        done = play("rl", tmp_path / "run", model=base, data=world.prompts, reward=world.reward("count"), steps=2,
                    lora=LORA, algorithm="ppo", **SMALL_RL)  # fmt: skip
    else:
        done = play(
            "preference", tmp_path / "run", model=base, data=world.preferences, steps=3, batch_size=8, lora=LORA
        )
    monkeypatch.chdir(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(done.model)
    found = their_logps(AutoPeftModelForCausalLM.from_pretrained(done.model).eval(), tokenizer)
    assert (found - kept[0]).abs().max() < TOLERANCE
    on_base = AutoModelForCausalLM.from_pretrained(world.model).eval()
    assert (found - their_logps(on_base, tokenizer)).abs().max() > 0.01
    assert torch.equal(their_logps(PeftModel.from_pretrained(on_base, done.model).eval(), tokenizer), found)
    stored = load_file(Path(done.model) / "adapter_model.safetensors")
    assert stored
    assert all("lora_" in name for name in stored)  # neither the critic's adapter nor its head
    assert len(stored) == len([n for n, _ in on_base.named_parameters() if "lora_" in n])
    assert not any(path.is_dir() for path in Path(done.model).iterdir())


# What goes with a policy --------------------------------------------------------------------------------------------


def chat_model(folder: Path) -> str:
    words = (*WORDS, "user", "assistant")
    tokenizer = word_tokenizer(words)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    return str(make_model(folder, tokenizer=tokenizer, architecture="llama", hidden=16, layers=1, heads=2, mlp=32,
                          context=32, seed=0))  # fmt: skip


def test_the_template_is_kept_and_generation_stops_where_training_taught_it(world: World, tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": f"{a} ?"}, {"role": "assistant", "content": f"it is {a}"}]}
            for a in "abcdef"]  # fmt: skip
    done = play("sft", tmp_path / "sft", model=chat_model(tmp_path / "base"), steps=60, batch_size=6,
                data=write(tmp_path / "chat.jsonl", rows))  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(done.model)
    assert tokenizer.chat_template == CHATML
    end, eos = tokenizer.convert_tokens_to_ids("<|im_end|>"), tokenizer.eos_token_id
    config = GenerationConfig.from_pretrained(done.model)
    assert config.eos_token_id == sorted([end, eos])
    assert config.pad_token_id == tokenizer.pad_token_id
    model = AutoModelForCausalLM.from_pretrained(done.model).eval()
    inputs = tokenizer.apply_chat_template(rows[0]["messages"][:1], add_generation_prompt=True, return_tensors="pt",
                                           return_dict=True)  # fmt: skip
    reply = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(reply, skip_special_tokens=True).split() == ["it", "is", "a"]
    assert int(reply[-1]) == end


def test_strings_stop_on_eos(world: World, tmp_path: Path) -> None:
    done = sft(world, tmp_path / "sft")
    tokenizer = AutoTokenizer.from_pretrained(done.model)
    assert GenerationConfig.from_pretrained(done.model).eos_token_id == [tokenizer.eos_token_id]
    assert tokenizer.chat_template is None


def test_a_model_folder_appears_whole_or_not_at_all(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(PreTrainedTokenizerFast, "save_pretrained", full)
        with pytest.raises(RunError, match=r"cannot save the model.*No space left"):
            sft(world, tmp_path / "sft")
    assert not (tmp_path / "sft" / "model").exists()
    done = sft(world, tmp_path / "sft")  # the same command again
    assert AutoModelForCausalLM.from_pretrained(done.model)


# Reward models ------------------------------------------------------------------------------------------------------


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Raw scores of `texts` by the reward model in memory, at the moment it is saved."""
    found: list[Tensor] = []
    save = reward_stage.save_classifier

    def keep_and_save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *rest: Any) -> None:
        backbone = seen[-1].backbone
        assert model is backbone.model
        found.append(reward_scores(seen[-1], texts(tokenizer), budget=1000))
        save(model, tokenizer, *rest)

    seen: list[RewardModel] = []
    load = reward_stage.load_reward_model
    monkeypatch.setattr(reward_stage, "load_reward_model", lambda *a: seen.append(load(*a)) or seen[-1])
    monkeypatch.setattr(reward_stage, "save_classifier", keep_and_save)
    return found


@pytest.mark.parametrize("pad", ["<pad>", "<eos>", "<bos>", None])
@pytest.mark.parametrize("lora", [None, LORA])
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_a_reward_model_gives_its_scores_in_a_padded_batch(
    architecture: Any, lora: Any, pad: str | None, world: World, judged: list[Tensor], tmp_path: Path
) -> None:
    tokenizer = word_tokenizer(WORDS)
    base = make_model(tmp_path / "base", tokenizer=tokenizer, architecture=architecture, hidden=16, layers=2, heads=2,
                      mlp=32, context=24, seed=0)  # fmt: skip
    tokenizer.pad_token = pad
    tokenizer.save_pretrained(base)
    done = play("reward", tmp_path / "rm", model=str(base), data=world.preferences, steps=8, batch_size=8, lora=lora)
    theirs = AutoTokenizer.from_pretrained(done.model)
    model = AutoModelForSequenceClassification.from_pretrained(done.model).eval()
    assert model.config.num_labels == 1
    assert theirs.pad_token_id == model.config.pad_token_id
    assert theirs.pad_token_id not in (theirs.eos_token_id, theirs.bos_token_id)
    with torch.no_grad():
        scores = model(**padded(theirs)).logits.squeeze(-1)
    assert (scores - judged[0]).abs().max() < TOLERANCE
    assert judged[0].std() > 0.01  # they differ at all
