"""What a tuning run prints and records."""

import shlex

from kqv import errors
from kqv.training.log import Log


class TuningLog(Log):
    """A Log of rewards."""

    @property
    def command(self):
        return f"tune.py --reward={shlex.quote(self.config.reward)}"

    def work_of_step(self, config):
        return f"{config.prompts_per_step} prompts x {config.num_samples} completions a step"

    def best(self, val_loss):
        return f"best mean reward on held-out prompts {-val_loss:.4g}"

    def training(self, step, numbers):
        """Log a step's numbers, see TuningRun.end_step."""
        self.record("train", step, numbers)
        text = "reward {reward:.4g}, {dead_groups:.0%} of the groups all alike, entropy {entropy:.2f}, "
        text += "{length:.1f} tokens, lr {lr:.2e}, {sampling_seconds:.2f} + {updating_seconds:.2f} s"
        text = text.format_map(numbers)
        if self.bar.disable:
            self.line(f"step {step}: {text}")
        else:
            self.bar.set_postfix_str(text, refresh=False)

    def evaluation(self, step, numbers, samples):
        """Log the numbers on held-out prompts, and a sample of the texts."""
        text = "step {step}: held-out reward {val_reward:.4g}"
        text += ", exact match {exact_match:.1%}" * ("exact_match" in numbers)
        text += ", pass@1 {pass_at_1:.1%}, pass@{k} {pass_at_k:.1%}; KL {kl:.3f} and {start_nats:.3f} nats a "
        text += "token by the start, {distinct_4grams:.0%} distinct 4-grams, {length:.1f} tokens"
        self.line(text.format(step=step, k=self.config.num_samples, **numbers))
        for sample in samples:
            self.line(sample, show=errors.print_text)
        self.record("evaluation", step, {**numbers, "sample": "\n".join(samples)})
