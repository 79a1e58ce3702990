"""README's "Your own data", its commands taken from the text and run in an empty folder; GUIDE's recipe."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import chat_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from world import lines

from klimb.config import parse_yaml
from klimb.stages.pipeline import check_recipe

ROOT = Path(__file__).parents[1]


def commands(model: str) -> str:
    """The shell blocks of the section as one script, with `model` in the place of the one that it names."""
    section = (ROOT / "README.md").read_text().split("\n## Your own data\n")[1].split("\n## ")[0]
    script = "\n".join(re.findall(r"^```\n(.*?)^```$", section, re.MULTILINE | re.DOTALL))
    script, named = re.subn(r"^DIR=\S+", f"DIR={model}", script, flags=re.MULTILINE)
    assert named == 1
    return script


def test_commands_can_be_pasted_into_zsh_too() -> None:
    """Typed in, it takes `#` for a word and brackets for file names; and a `\\` at an end takes in the next line."""
    blocks = re.findall(r"^```\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert blocks
    for block in blocks:
        typed = re.sub(r"<<'END'\n.*?^END$", "", block, flags=re.MULTILINE | re.DOTALL)
        assert not re.search(r"(^|\s)#|[][]", typed), typed
        assert not typed.rstrip().endswith("\\")


def test_the_recipe_of_the_guide_is_one() -> None:
    section = (ROOT / "docs" / "GUIDE.md").read_text().split("\n## Recipes and keys\n")[1].split("\n## ")[0]
    [text] = re.findall(r"^```yaml\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    assert [*check_recipe("sums", parse_yaml(text))["stages"]] == ["sft", "grpo"]


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["qwen3", "llama"])
def test_your_own_data(architecture: str, tmp_path: Path) -> None:
    model = chat_model(tmp_path / "model", architecture)  # type: ignore[arg-type]
    here = tmp_path / "empty"
    here.mkdir()
    script = commands(model)
    for command in ("check", "sft", "dpo", "grpo", "chat", "export"):
        assert f"\nklimb {command} " in script or f"| klimb {command} " in script
    preamble = f'set -e -o pipefail\nklimb() {{ "{sys.executable}" -m klimb "$@"; }}\n'
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(["bash", "-c", preamble + script], cwd=here, env=env, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    for run, last in (("1-sft", 1), ("2-dpo", 1), ("3-grpo", 10)):
        assert lines(here / run / "metrics.jsonl")[-1]["step"] == last
    assert lines(here / "2-dpo" / "metrics.jsonl")[0]["loss"] == pytest.approx(
        0.6931472
    )  # ln 2: the reference is SFT's
    exports_are_what_was_trained(here)


@torch.no_grad()
def exports_are_what_was_trained(here: Path) -> None:
    """For transformers and peft, which know nothing of klimb: the same numbers, template and stop tokens."""
    from peft import AutoPeftModelForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(here / "mine")
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "3 + 4 ="}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    merged = AutoModelForCausalLM.from_pretrained(here / "mine").eval()
    adapter = AutoPeftModelForCausalLM.from_pretrained(here / "adapter").eval()
    expected = AutoPeftModelForCausalLM.from_pretrained(here / "3-grpo" / "model").eval()(**asked).logits
    assert torch.equal(adapter(**asked).logits, expected)
    assert torch.allclose(merged(**asked).logits, expected, atol=1e-4)  # fp32: W + BA once, instead of Wx + BAx
    ends = GenerationConfig.from_pretrained(here / "mine").eos_token_id
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in ends
    written = merged.generate(**asked, max_new_tokens=4, do_sample=False)
    assert written.shape[1] > asked["input_ids"].shape[1]
