"""The settings that tuning by rewards has of its own."""

from dataclasses import dataclass
from typing import Literal

from kqv.settings import setting


@dataclass(frozen=True)
class RewardSettings:
    """Rewards"""

    reward: str = setting(
        "", "a Python file, run as your own code, with def reward(prompt, completion, answer)", path=True
    )
    method: Literal["best", "grpo"] = setting(
        "best", "best: learn the completions of the highest reward; grpo: the policy gradient"
    )
    kl_weight: float = setting(
        0.0, "grpo: weight of KL(model || start), nats a token, in the loss", at_least=0.0
    )
    updates: int = setting(4, "best: optimizer steps on the completions of a step", at_least=1)
    pass_reward: float = setting(1.0, "a completion passes with at least this reward: for pass@1 and pass@k")


@dataclass(frozen=True)
class DrawSettings:
    """Completions"""

    dataset: str = setting(
        "",
        "a prepared set; a prompt is a conversation without its last answer, or prompt_tokens of a text",
        path=True,
    )
    prompt_tokens: int = setting(16, "tokens of a prompt, of a set of texts", at_least=1)
    prompts_per_step: int = setting(32, "prompts in a step", at_least=1)
    num_samples: int = setting(8, "completions of each prompt", at_least=2)
    max_new_tokens: int = setting(64, "tokens in each, at most", at_least=1)
    temperature: float = setting(1.0, "of drawing; the loss of grpo is of the same", at_least=0.01)
    batch_size: int = setting(32, "rows that are drawn, or learnt from, at once", at_least=1)
    block_size: int = setting(1024, "the longest context, in tokens; by default the model's", at_least=1)
    eval_prompts: int = setting(64, "held-out prompts, of the validation split", at_least=1)
    eval_interval: int = setting(10, "steps between evaluations", at_least=1)
    show: int = setting(0, "draw for so many prompts, print what would be learnt, and end", at_least=0)
