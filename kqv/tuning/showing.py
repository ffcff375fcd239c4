"""What a tuning step would learn, without training."""

from kqv.errors import print_text
from kqv.printable import one_line
from kqv.text.showing import learnt_marks, token_text
from kqv.tuning.rewards import advantages, highest


def show(run):
    """
    Print the completions of the first config.show prompts: their tokens with a | between them, those that
    are learnt marked, each with its reward and, for grpo, its advantage. Returns how many tokens the longest
    row of a step may have.
    """
    rollouts, rewards, _ = run.round(run.config.show)
    G, n = rewards.shape
    grpo = run.config.method == "grpo"
    gains = advantages(rewards)  # (G, n)
    learnt = gains != 0 if grpo else highest(rewards)
    names = {number: name for name, number in run.tokenizer.specials().items()}
    begin, end = learnt_marks()
    for group in range(G):
        prompt = rollouts[group * n].prompt
        print_text(
            f"prompt {group + 1}: {one_line(prompt.text)}; the set has {one_line(prompt.answer)}", raw=True
        )
        for place in range(n):
            tokens = "|".join(token_text(run.tokenizer, names, i) for i in rollouts[group * n + place].ids)
            tokens = f"{begin}{tokens}{end}" if learnt[group, place] else f" {tokens}"
            gain = f", advantage {gains[group, place]:+.4g}" if grpo else ""
            print_text(f"  reward {rewards[group, place]:.4g}{gain}: {tokens}", raw=True)
        nothing = "" if learnt[group].any() else ": nothing to learn, since all rewards are the same"
        print_text(f"  mean reward {rewards[group].mean():.4g}{nothing}\n", raw=True)
    longest = max(len(rollout.prompt.ids) for rollout in rollouts) + run.config.max_new_tokens - 1
    return min(longest, run.state.model.config.block_size)
