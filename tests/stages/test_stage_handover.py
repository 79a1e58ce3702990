"""base → SFT → DPO, GRPO or PPO → export, with all weights or adapters: at each arrow nothing is lost on the way.

The oracle is transformers and peft on the folder that the stage before left: their padded forward, their tokenizer.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from world import SMALL_RL, WORDS, Played, klimb, play, write

from klimb.batch import Row, TokenBatch
from klimb.errors import KlimbError
from klimb.lab.scratch import make_model, word_tokenizer
from klimb.models.faces import Policy, policy_logps
from klimb.stages import preference, rl
from klimb.stages.models import Loaded

LORA = {"rank": 4, "alpha": 8.0}
TEMPLATE = (
    "{% for m in messages %}<|im_start|> {{ m['role'] }} {{ m['content'] }} <|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)
TOLERANCE = 1e-5  # fp32: padded attention in place of packed, and a merged adapter in place of one beside the weights
TEXTS = ([16, 1, 0, 9, 10, 1, 11, 17], [16, 2, 0, 7, 7, 3, 4, 8])


def tokens_of() -> TokenBatch:
    rows = [[Row(text[:3], text[3:], [True] * (len(text) - 3))] for text in TEXTS]
    return TokenBatch.from_rows(rows, range(len(rows)), ["a", "b"])


def mine(policy: Policy) -> Tensor:
    return policy_logps(policy, tokens_of(), budget=1000).logps


@torch.no_grad()
def theirs(folder: str | Path) -> Tensor:
    from peft import AutoPeftModelForCausalLM

    adapter = (Path(folder) / "adapter_config.json").is_file()
    model = (AutoPeftModelForCausalLM if adapter else AutoModelForCausalLM).from_pretrained(folder).eval()
    ids = torch.tensor(TEXTS)
    return model(ids).logits.log_softmax(-1)[:, 2:-1].gather(2, ids[:, 3:, None]).squeeze(2)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Tied, with a template, turn markers that are special tokens, spare embeddings and sampling settings."""
    folder = tmp_path_factory.mktemp("base") / "base"
    tokenizer = word_tokenizer((*WORDS, "user", "assistant"))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = TEMPLATE
    make_model(folder, tokenizer=tokenizer, architecture="llama", hidden=16, layers=2, heads=2, mlp=32, context=32,
               seed=0, tie=True)  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(0)  # the new rows are drawn from what the tests before left of torch's stream
    model.resize_token_embeddings(32, mean_resizing=False)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="4KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    generation = folder / "generation_config.json"
    settings = {"do_sample": False, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [3, 17]}
    generation.write_text(json.dumps({**json.loads(generation.read_text()), **settings}))
    return str(folder)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("files")
    (folder / "rewards.py").write_text(
        "def yes(completions, **_):\n    return [c[-1]['content'].split().count('yes') / 4 for c in completions]\n"
    )
    said: Any = lambda text: [{"role": "assistant", "content": text}]  # noqa: E731
    asked = [[{"role": "user", "content": f"{letter} ?"}] for letter in "abcdef"]
    return {
        "sft": write(folder / "sft.jsonl", [{"messages": [*p, *said("it is so")]} for p in asked]),
        "dpo": write(folder / "dpo.jsonl",
                     [{"prompt": p, "chosen": said("yes"), "rejected": said("no")} for p in asked]),
        "rl": write(folder / "rl.jsonl", [{"prompt": p} for p in asked]),
        "reward": f"{folder / 'rewards.py'}:yes",
    }  # fmt: skip


@pytest.fixture(scope="module", params=[None, LORA], ids=["sft-full", "sft-lora"])
def sft(request: pytest.FixtureRequest, base: str, files: dict[str, str], tmp_path_factory: Any) -> Played:
    return play("sft", tmp_path_factory.mktemp("sft") / "sft", model=base, data=files["sft"], steps=8, batch_size=6,
                lora=request.param)  # fmt: skip


class Seen:
    """What the faces of a run gave: the reference when it was made, all of them when the model was saved."""

    reference: Policy
    reference_before: Tensor
    reference_after: Tensor
    policy_before: Tensor
    policy_after: Tensor


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    found = Seen()
    save = Loaded.save
    for stage in (rl, preference):

        def made(session: Any, policy: Loaded, *rest: Any, load: Any = stage.load_reference, **options: Any) -> Policy:
            found.reference = load(session, policy, *rest, **options)
            found.reference_before, found.policy_before = mine(found.reference), mine(policy.policy)
            return found.reference

        monkeypatch.setattr(stage, "load_reference", made)

    def saved(self: Loaded, directory: Path) -> None:
        if hasattr(found, "reference"):
            found.reference_after, found.policy_after = mine(found.reference), mine(self.policy)
        save(self, directory)

    monkeypatch.setattr(Loaded, "save", saved)
    return found


def second_stage(kind: str, out: Path, model: str, files: dict[str, str], **values: Any) -> Played:
    if kind == "dpo":
        return play("preference", out, model=model, data=files["dpo"], steps=3, batch_size=6, **values)
    algorithm = {"name": kind, "kl": {"beta": 0.05}}
    return play("rl", out, model=model, data=files["rl"], reward=files["reward"], algorithm=algorithm, steps=3,
                **{**SMALL_RL, **values})  # fmt: skip


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("kind", ["dpo", "grpo", "ppo"])
def test_each_stage_starts_from_the_one_before_and_is_compared_with_it(
    kind: str, lora: Any, sft: Played, base: str, files: dict[str, str], seen: Seen, here: Path
) -> None:
    before = theirs(sft.model)
    assert (before - theirs(base)).abs().max() > 0.1  # the stage before taught something
    done = second_stage(kind, here / "run", sft.model, files, lora=lora)
    assert (seen.policy_before - before).abs().max() < TOLERANCE
    assert (seen.reference_before - before).abs().max() < TOLERANCE
    assert torch.equal(seen.reference_after, seen.reference_before)
    assert (seen.policy_after - before).abs().max() > 0.01
    assert (theirs(done.model) - seen.policy_after).abs().max() < TOLERANCE

    assert klimb("export", "run", "out=mine").code == 0
    assert (theirs("mine") - seen.policy_after).abs().max() < TOLERANCE
    with safe_open("mine/model.safetensors", "pt") as weights:
        assert "lm_head.weight" not in weights.keys()  # noqa: SIM118  tied
        assert weights.get_tensor("model.embed_tokens.weight").shape == (32, 16)
    kept, given = AutoTokenizer.from_pretrained("mine"), AutoTokenizer.from_pretrained(base)
    for fact in ("chat_template", "special_tokens_map", "added_tokens_decoder", "model_max_length", "padding_side"):
        assert getattr(kept, fact) == getattr(given, fact), fact
    assert kept.get_vocab() == given.get_vocab()
    generation = GenerationConfig.from_pretrained("mine")
    assert (generation.temperature, generation.top_p, generation.do_sample) == (0.6, 0.9, True)
    end = given.convert_tokens_to_ids("<|im_end|>")
    assert generation.eos_token_id == sorted({3, 17, given.eos_token_id, end})  # 3 and 17: the base's own


def test_a_named_reference_is_that_model(base: str, files: dict[str, str], sft: Played, seen: Seen, here: Path) -> None:
    second_stage("grpo", here / "run", sft.model, files, reference=base)
    assert (seen.reference_before - theirs(base)).abs().max() < TOLERANCE
    assert torch.equal(seen.reference_after, seen.reference_before)


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_a_bfloat16_checkpoint_is_the_same_model(lora: Any, base: str, files: dict[str, str], here: Path) -> None:
    """On a CPU it computes in fp32; what is saved is what was computed, not what was given."""
    AutoModelForCausalLM.from_pretrained(base).to(torch.bfloat16).save_pretrained("half")
    AutoTokenizer.from_pretrained(base).save_pretrained("half")
    start = theirs_in_fp32("half")
    done = play("sft", here / "run", model="half", data=files["sft"], steps=1, batch_size=6, lora=lora,
                optimizer={"lr": 1e-12})  # fmt: skip
    assert klimb("export", "run", "out=mine").code == 0
    assert AutoModelForCausalLM.from_pretrained("mine").dtype == torch.float32
    assert (theirs("mine") - start).abs().max() < TOLERANCE
    assert done.rows[0]["loss"] > 0


@torch.no_grad()
def theirs_in_fp32(folder: str) -> Tensor:
    ids = torch.tensor(TEXTS)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model(ids).logits.log_softmax(-1)[:, 2:-1].gather(2, ids[:, 3:, None]).squeeze(2)


def test_a_template_that_cannot_be_trained_on_harms_no_training_on_plain_text(base: str, here: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    AutoModelForCausalLM.from_pretrained(base).save_pretrained("plain")
    tokenizer.save_pretrained("plain")
    rows = write(here / "rows.jsonl", [{"prompt": "a ?", "completion": "it is so"}])
    done = play("sft", here / "run", model="plain", data=rows, steps=1, batch_size=1)
    assert tokenizer.eos_token_id in GenerationConfig.from_pretrained(done.model).eos_token_id


def test_python_beside_a_model_is_never_run(base: str, files: dict[str, str], here: Path) -> None:
    AutoModelForCausalLM.from_pretrained(base).save_pretrained("foreign")
    AutoTokenizer.from_pretrained(base).save_pretrained("foreign")
    config = here / "foreign" / "config.json"
    code = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    config.write_text(json.dumps({**json.loads(config.read_text()), "model_type": "own", "auto_map": code}))
    (here / "foreign" / "own.py").write_text("open('ran', 'w').close()\n")
    with pytest.raises(
        KlimbError,
        match=r"foreign: cannot be loaded \(it needs Python code of its own, which runs only",
    ):
        play("sft", here / "run", model="foreign", data=files["sft"], steps=1, batch_size=6)
    assert not (here / "ran").exists()
