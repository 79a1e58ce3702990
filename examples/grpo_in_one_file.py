"""GRPO in one file: the whole algorithm in plain PyTorch, from prompts to a report. Half a minute on a CPU.

    python examples/grpo_in_one_file.py            # seed 0; --seed 1 for another

The task: a word in, its letters in order out, `dacb → abcd`. A program can check that, so the program is the reward.
A small transformer first imitates a sloppy scribe, who puts the letters in any order on half of his days. Then it is
only told of its own answers whether they are right: enough to end up better than its teacher, on other words too.

One step, as in DeepSeekMath (Shao et al. 2024, arXiv 2402.03300, section 4.1):

    prompt → G answers each → reward → advantage within the group → a few updates on those answers → and again

Begin with `train`. klimb does the same on models of any size, and a test holds this file's gradient against klimb's.
"""

from __future__ import annotations

import argparse
import copy
import random

import torch
from torch import Tensor, nn

LETTERS = "abcdefgh"
VOCABULARY = [*LETTERS, "_", "=", "."]  # "_" fills a word up to WIDTH, "=" asks, "." ends an answer
TOKEN = {letter: number for number, letter in enumerate(VOCABULARY)}
END = TOKEN["."]
WIDTH = 5  # letters in the longest word
PROMPT = WIDTH + 1  # tokens in a prompt; all answers begin in the same place, so that nothing is padded before them
ANSWER = WIDTH + 1  # most tokens in an answer: the letters and the end

PROMPTS_PER_STEP = 16
SAMPLES_PER_PROMPT = 8  # G
UPDATES_PER_STEP = 2
STEPS = 150
CLIP = 0.2  # ε of equation 3
BETA = 0.04  # β of equation 3
EPS = 1e-4  # keeps the advantage finite where the rewards of a group hardly differ


# The world: words, the scribe who is imitated, and the program that knows what is right -------------------------------


def words(count: int, rng: random.Random, held_out: bool) -> list[str]:
    """Words of 2 to 5 letters. A fifth of all, told by a sum over letters and places, is never trained on."""
    found: list[str] = []
    while len(found) < count:
        word = "".join(rng.choices(LETTERS, k=rng.randint(2, WIDTH)))
        if (sum(TOKEN[letter] * (place + 1) for place, letter in enumerate(word)) % 5 == 0) == held_out:
            found.append(word)
    return found


def reward(word: str, answer: str) -> float:
    """1 for the letters in order and an end after them, else 0. Nothing in between: there is no credit for a start."""
    return float(answer == "".join(sorted(word)) + ".")


def sloppy(word: str, rng: random.Random) -> str:
    """The scribe: right on half of his days, on the others the letters in any order."""
    letters = sorted(word)
    if rng.random() < 0.5:
        rng.shuffle(letters)
    return "".join(letters) + "."


def encode(texts: list[str], width: int) -> Tensor:
    """[B, width] token numbers, filled up with ends."""
    return torch.tensor([[TOKEN[letter] for letter in text.ljust(width, ".")] for text in texts])


def prompts_of(asked: list[str]) -> Tensor:
    return encode([word.ljust(WIDTH, "_") + "=" for word in asked], PROMPT)


def until_end(tokens: Tensor) -> Tensor:
    """[B, T] bool: the tokens that the policy chose, up to its first END and with it. What follows is no choice."""
    return (tokens == END).cumsum(dim=1) - (tokens == END).long() == 0  # no end before it


def texts_of(tokens: Tensor, mask: Tensor) -> list[str]:
    return ["".join(VOCABULARY[t] for t, kept in zip(row, keep) if kept) for row, keep in zip(tokens.tolist(), mask)]


# The policy ----------------------------------------------------------------------------------------------------------


class Policy(nn.Module):
    """A causal transformer: two layers, 64 wide, 100,000 weights."""

    def __init__(self, width: int = 64, heads: int = 4, layers: int = 2) -> None:
        super().__init__()
        self.token = nn.Embedding(len(VOCABULARY), width)
        self.place = nn.Embedding(PROMPT + ANSWER, width)
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, len(VOCABULARY))

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [B, N] → log-probs of the next token at each place [B, N, V]."""
        length = tokens.shape[1]
        causal = torch.triu(torch.ones(length, length, dtype=torch.bool), diagonal=1)  # True: may not be looked at
        hidden = self.layers(self.token(tokens) + self.place(torch.arange(length)), mask=causal)
        return self.head(hidden).log_softmax(dim=-1)


def logps_of(policy: Policy, prompts: Tensor, answers: Tensor) -> Tensor:
    """log π(o_t | q, o_<t) of every token of the answers [B, T]: the output one place earlier is its distribution."""
    logps = policy(torch.cat([prompts, answers], dim=1))[:, PROMPT - 1 : -1]
    return logps.gather(-1, answers[..., None]).squeeze(-1)


@torch.no_grad()
def sample(policy: Policy, prompts: Tensor, generator: torch.Generator | None) -> Tensor:
    """Answers [B, ANSWER] at temperature 1; without a generator the likeliest token each time."""
    tokens = prompts
    for _ in range(ANSWER):
        logps = policy(tokens)[:, -1]
        following = logps.argmax(-1) if generator is None else torch.multinomial(logps.exp(), 1, generator=generator)
        tokens = torch.cat([tokens, following.view(-1, 1)], dim=1)
    return tokens[:, PROMPT:]


# The algorithm -------------------------------------------------------------------------------------------------------


def advantages_of(rewards: Tensor) -> Tensor:
    """A_i = (r_i − mean(r)) / (std(r) + eps) within each group; rewards and result [groups, G].

    arXiv 2402.03300, section 4.1.2. The other answers to the same prompt say what was to be expected, so no critic
    is needed. Where all answers are right, or all wrong, every advantage is 0: such a prompt teaches nothing.
    """
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    return centred / (rewards.std(dim=1, keepdim=True) + EPS)


def grpo_loss(logps: Tensor, old_logps: Tensor, ref_logps: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """The negative of J in arXiv 2402.03300, equation 3. Log-probs and mask [B, T], advantages [B] → scalar.

    J = 1/B Σ_i 1/|o_i| Σ_t { min(r A, clip(r, 1−ε, 1+ε) A) − β KL }
    """
    a = advantages[:, None]  # one for the whole answer: only its end says whether it is right
    # r = π/π_old. It is 1 in the first update; in later ones it says how far the policy has moved since it sampled.
    ratio = (logps - old_logps).exp()
    # Past the bound there is nothing more to be won, so no gradient: PPO's clip (arXiv 1707.06347, equation 7). The
    # minimum keeps the gradient of a token that has moved the wrong way, however far.
    gained = torch.minimum(ratio * a, ratio.clamp(1 - CLIP, 1 + CLIP) * a)
    # Equation 4, "k3" (J. Schulman, "Approximating KL divergence", 2020): never below 0, on average KL(π ‖ π_ref).
    x = ref_logps - logps
    leash = x.exp() - x - 1
    # `where` and not a product: what stands behind the end of an answer may be anything, and 0 · ∞ is not 0.
    per_token = torch.where(mask, -gained + BETA * leash, 0.0)
    # First over each answer's own tokens, then over answers: every answer weighs the same, long or short.
    return (per_token.sum(dim=1) / mask.sum(dim=1)).mean()


def train(policy: Policy, seed: int) -> list[dict[str, float]]:
    """STEPS steps of GRPO on the policy, in place → what was measured at each."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    reference = copy.deepcopy(policy).requires_grad_(False)  # where training began: what β holds the policy near
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3, weight_decay=0.0)
    history = []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (1 - step / STEPS)
        asked = [word for word in words(PROMPTS_PER_STEP, rng, held_out=False) for _ in range(SAMPLES_PER_PROMPT)]
        prompts = prompts_of(asked)
        answers = sample(policy, prompts, generator)
        mask = until_end(answers)
        rewards = torch.tensor([reward(*pair) for pair in zip(asked, texts_of(answers, mask))])
        advantages = advantages_of(rewards.view(-1, SAMPLES_PER_PROMPT)).flatten()
        with torch.no_grad():  # as they were when the answers were sampled
            old_logps, ref_logps = logps_of(policy, prompts, answers), logps_of(reference, prompts, answers)

        # Each part is learnt from once. A group may be torn apart: its advantages are already known.
        for part in torch.randperm(len(asked), generator=generator).chunk(UPDATES_PER_STEP):
            logps = logps_of(policy, prompts[part], answers[part])
            loss = grpo_loss(logps, old_logps[part], ref_logps[part], advantages[part], mask[part])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()

        kl = torch.where(mask, old_logps - ref_logps, 0.0).sum(dim=1).mean()  # nats an answer, estimated on samples
        silent = (rewards.view(-1, SAMPLES_PER_PROMPT).std(dim=1) == 0).double().mean()
        history.append({"reward": rewards.mean().item(), "kl": kl.item(), "silent groups": silent.item()})
    return history


# What comes before and after -----------------------------------------------------------------------------------------


def warm_start(seed: int, steps: int = 400) -> Policy:
    """Random weights → a policy that imitates the scribe: cross-entropy on his answers, every token weighing alike."""
    torch.manual_seed(seed)
    policy, rng = Policy(), random.Random(1000 + seed)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=2e-3, weight_decay=0.0)
    for _ in range(steps):
        shown = words(64, rng, held_out=False)
        answers = encode([sloppy(word, rng) for word in shown], ANSWER)
        mask = until_end(answers)
        loss = -torch.where(mask, logps_of(policy, prompts_of(shown), answers), 0.0).sum() / mask.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return policy


def right(policy: Policy, seed: int, count: int = 500) -> tuple[float, float, list[tuple[str, str]]]:
    """Shares of right answers to words never trained on (sampled, likeliest), and the first sampled answers."""
    asked, shares, shown = words(count, random.Random(seed), held_out=True), [], []
    for generator in (torch.Generator().manual_seed(seed), None):
        answers = sample(policy, prompts_of(asked), generator)
        texts = texts_of(answers, until_end(answers))
        shares.append(sum(reward(*pair) for pair in zip(asked, texts)) / count)
        shown.append(list(zip(asked, texts)))
    return shares[0], shares[1], shown[0][:6]


def curve(values: list[float], height: int = 8, columns: int = 75) -> str:
    """Values in [0, 1] as a picture of characters, each column the mean of a few steps."""
    width = -(-len(values) // columns)
    means = [sum(part) / len(part) for i in range(0, len(values), width) if (part := values[i : i + width])]
    rows = [[" ▁▂▃▄▅▆▇█"[int(min(max(mean * height - row, 0), 1) * 8)] for mean in means] for row in range(height)]
    return "\n".join(f"{(row + 1) / height:5.2f} {''.join(rows[row])}" for row in reversed(range(height)))


def main(seed: int) -> tuple[float, float]:
    policy = warm_start(seed)
    before, before_greedy, answers_before = right(policy, seed)
    history = train(policy, seed)
    after, after_greedy, answers_after = right(policy, seed)

    print(f"reward of each step's {PROMPTS_PER_STEP * SAMPLES_PER_PROMPT} answers, steps 1 to {STEPS}")
    print(curve([measured["reward"] for measured in history]))
    last = history[-1]
    print(f"\nKL from the start {last['kl']:.2f} nats an answer; groups without a signal {last['silent groups']:.0%}")
    print(f"\nwords never trained on       before   after\n  right, sampled             {before:6.1%}  {after:6.1%}")
    print(f"  right, likeliest tokens    {before_greedy:6.1%}  {after_greedy:6.1%}\n")
    for (word, was), (_, now) in zip(answers_before, answers_after):
        marks = ["right" if reward(word, answer) else "wrong" for answer in (was, now)]
        print(f"  {word:6} before {was:7} {marks[0]}   after {now:7} {marks[1]}")
    return before, after


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="GRPO in one file")
    parser.add_argument("--seed", type=int, default=0)
    main(parser.parse_args().seed)
