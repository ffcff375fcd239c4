"""
What tuning by rewards computes: the loss of the policy gradient, and how far the model is from its start.

Shapes: B rows, T tokens, N learnt tokens of them, C channels, V ids.
"""

from torch import nn


class PolicyGradient(nn.Module):
    """
    A GPT with the loss whose gradient is that of the expected reward (REINFORCE, Williams 1992):

        - sum over the completions' tokens of A log p(token)  +  kl_weight x sum over them of KL(p || p_start)

    where A is the advantage of the completion, p the probabilities of all ids at `temperature`, with which
    completions were drawn, and p_start those of the model that tuning began with. The divergence is the exact
    one over all ids. There is one update for each batch that was drawn, so no ratio of old and new
    probabilities is needed, and no clipping.
    """

    def __init__(self, gpt, start, vocab_size, temperature=1.0, kl_weight=0.0):
        super().__init__()
        self.gpt, self.vocab_size, self.temperature, self.kl_weight = gpt, vocab_size, temperature, kl_weight
        self.start = (start,)  # in a tuple, so that its weights are no weights of this module

    def forward(self, idx, targets, advantages, scale):
        """
        idx, targets (B, T), -1 where no token of a completion comes next, advantages (B,) -> the loss times
        `scale`, one number.
        """
        learnt = targets >= 0  # (B, T)
        logp = logprobs(self.gpt, idx, learnt, self.vocab_size, self.temperature)  # (N, V)
        chosen = logp.gather(1, targets[learnt][:, None])[:, 0]  # (N,)
        loss = -(advantages[:, None].expand_as(idx)[learnt] * chosen).sum()
        if self.kl_weight:
            start = self.start[0](idx, learnt, self.vocab_size, self.temperature)
            loss = loss + self.kl_weight * divergence(logp, start).sum()
        return loss * scale


def logprobs(gpt, idx, learnt, vocab_size, temperature=1.0):
    """idx, learnt (B, T) -> log-probabilities (N, V), in float32, of what follows each learnt place."""
    logits = gpt.lm_head(gpt.hidden(idx)[learnt])[:, :vocab_size]  # (N, C) -> (N, V)
    return (logits.float() / temperature).log_softmax(dim=-1)


def divergence(logp, logq):
    """Log-probabilities (N, V) of p and q -> KL(p || q) of each token, (N,), in nats."""
    return (logp.exp() * (logp - logq)).sum(dim=-1)
