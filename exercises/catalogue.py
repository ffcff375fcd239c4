"""
The exercises, in the order in which a learner meets them. A mistake is a text of the right function and what
stands there instead; its line says what is wrong without giving the answer away.
"""

from types import SimpleNamespace

import numpy as np
import torch

from exercises.grade import Exercise


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def digits_calls(module):
    network = module.Network((4, 3, 2))
    x, y = np.array([0.1, 0.9, 0.3, 0.5]), np.array([0.0, 1.0])
    biases, weights = network.backprop(x, y)
    network.update_mini_batch([(x, y), (1 - x, 1 - y), (x / 2, y)], 0.5)
    return [*biases, *weights, *network.biases, *network.weights]


def attention_calls(module):
    q, k, v = random(2, 4, 5, 6), random(2, 2, 5, 6, seed=1), random(2, 2, 5, 6, seed=2)
    return list(module.attention(q, k, v))


def mask_calls(module):
    return [module.GPT.mask_of_examples(torch.tensor([[0, 1, 2, 0, 1], [0, 0, 1, 2, 3]]))]


def angles_calls(module):
    positions = torch.arange(6)[None]
    plain = module.GPTConfig(rope_theta=100.0)
    scaled = module.GPTConfig(rope_theta=100.0, rope_factor=4.0, rope_original=40)
    return [module.angles_of(positions, 8, plain), module.angles_of(positions, 8, scaled)]


def rotate_calls(module):
    angles = random(1, 5, 1, 3, seed=1)
    return [module.rotate(random(2, 5, 4, 6), angles.cos(), angles.sin())]


def norm_calls(module):
    norm = module.RMSNorm(6, eps=0.1)
    norm.weight.copy_(random(6, seed=1))
    return [norm(random(2, 3, 6)), norm(random(2, 3, 6) / 100)]


def loss_calls(module):
    x, head = random(5, 4), random(7, 4, seed=1)
    targets = torch.tensor([0, 3, -1, 2, 4])
    return [module.next_token_loss(x, head, targets), module.next_token_loss(x, head, targets, 6)]


def draw_calls(module):
    logits, found = 2 * random(6, 12), []
    for number in (0.05, 0.5, 0.95):
        uniform = torch.full((6, 1), number)
        for settings in ({}, {"top_k": 4}, {"top_p": 0.6}, {"min_p": 0.3}, {"temperature": 0.0}):
            sampling = module.Sampling(**{"temperature": 0.7, "top_k": 0, **settings})
            sampler = module.Sampler(module.Work.of(sampling, 12), 6, 12, "cpu")
            sampler.begin(sampling, [[0]] * 6)
            found.append(sampler.draw(logits, uniform))
    return found


def beam_calls(module):
    logits, scores = random(6, 8), torch.tensor([[-1.0, -2.0, -5.0], [-3.0, -3.5, -4.0]])
    return list(module.extensions(logits, scores, 7))


def adamw_calls(module):
    weight, gradient = np.array([[1.0, -2.0], [3.0, 0.5]]), np.array([[0.1, -0.3], [0.0, 1e-8]])
    first = module.adamw_step(weight, gradient, 0 * weight, 0 * weight, 1, 0.1)
    return [*first, *module.adamw_step(first[0], 2 * gradient, *first[1:], 2, 0.1)]


def merge_calls(module):
    return [module.merge([1, 1, 1, 2, 1, 1, 2, 1, 2], pair, 9) for pair in ((1, 1), (1, 2), (2, 2), (2, 1))]


def cache_calls(module):
    config = module.GPTConfig(n_layer=1, n_head=2, n_embd=8, block_size=6, vocab_size=3)
    cache = module.LayerCache(config, 2, 6, None, torch.float32)
    first = cache.update(random(2, 2, 2, 4), random(2, 2, 2, 4, seed=1), torch.tensor([[0, 1], [0, 1]]), 4)
    second = cache.update(random(2, 1, 2, 4, seed=2), random(2, 1, 2, 4, seed=3), torch.tensor([[2], [1]]), 4)
    return [*first, *second]


def schedule_calls(module):
    asked = {"learning_rate": 1.0, "min_lr": 0.1, "decay_lr": True, "schedule": "cosine", "warmup_iters": 4}
    asked |= {"cooldown_iters": 0, "lr_decay_iters": 16, "max_iters": 24}
    config = SimpleNamespace(**asked)
    return [module.learning_rate_at(step, config, peak) for step in range(20) for peak in (None, 3.0)]


EXERCISES = (
    Exercise(
        title="Backpropagation, in a network that reads digits",
        file="exercises/small.py",
        names=("Network.backprop", "Network.update_mini_batch"),
        task=(
            "Two functions are missing. backprop(x (m,), y (n,)) gives the gradient of |a - y|^2 / 2 "
            "for each "
            "bias (n,) and each weight (n, m), as two lists. update_mini_batch(batch, eta) changes "
            "biases and "
            "weights by the mean gradient of the batch, times eta."
        ),
        calls=digits_calls,
        tests=("tests/exercises/test_small.py", "-k", "backpropagation or mini_batch or digits"),
        mistakes={
            "The gradient is for the output of a neuron, not for its weighted sum: sigmoid'(z) is missing.": (
                "delta = error * a * (1 - a)",
                "delta = error",
            ),
            "All gradients have the wrong sign: the error is what the network gave, less what was wanted.": (
                "activations[-1] - y",
                "y - activations[-1]",
            ),
            "The gradient of the weights is wrong: it needs what came INTO the layer.": (
                "np.outer(delta, activations[layer])",
                "np.outer(delta, activations[layer + 1][: 1].repeat(len(activations[layer])))",
            ),
            "The error goes back through weights that are not transposed, or not through weights at all.": (
                "error = self.weights[layer].T @ delta",
                "error = np.full(len(activations[layer]), delta.sum())",
            ),
            "backprop is right, but the step is the sum over the batch, not its mean.": (
                "eta * np.mean([b[layer] for b, _ in gradients], axis=0)\n"
                "            self.weights[layer] = self.weights[layer] - eta * np.mean(",
                "eta * np.sum([b[layer] for b, _ in gradients], axis=0)\n"
                "            self.weights[layer] = self.weights[layer] - eta * np.sum(",
            ),
        },
    ),
    Exercise(
        title="The formula of attention",
        file="kqv/looking/attention.py",
        names=("attention",),
        task=(
            "attention(q (B, nh, T, hs), k and v (B, nkv, T, hs), what_if) gives each head's result "
            "(B, nh, T, "
            "hs), and the scores and weights (B, nh, T, T). nh / nkv heads of queries in a row share a "
            "head of "
            "keys and values. SCORES[what_if.score](q, k) gives the products; may_look(T, what_if) who "
            "may look."
        ),
        calls=attention_calls,
        tests=("tests/looking/test_trace.py",),
        mistakes={
            "The scores are too large: what are they divided by, so that their variance is 1?": (
                "    if what_if.scaled:\n        scores = scores / math.sqrt(q.size(-1))\n",
                "",
            ),
            (
                "The scores are divided by hs: two random vectors have a product of variance hs, so "
                "divide by its root."
            ): (
                "scores / math.sqrt(q.size(-1))",
                "scores / q.size(-1)",
            ),
            (
                "The softmax runs over the wrong dimension: each query's weights sum to 1, so it is "
                "over the keys."
            ): (
                "softmax(dim=-1)",
                "softmax(dim=-2)",
            ),
            "The mask comes after the softmax: the weights that are left do not sum to 1.": (
                "scores.masked_fill(~allowed, -math.inf).softmax(dim=-1)",
                "scores.softmax(dim=-1)",
            ),
            "Queries meet the wrong keys: heads of queries that share a head of keys are neighbours.": (
                "k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)",
                "k, v = k.repeat(1, group, 1, 1), v.repeat(1, group, 1, 1)",
            ),
        },
    ),
    Exercise(
        title="The mask",
        file="model.py",
        names=("GPT.mask_of_examples",),
        task=(
            "mask_of_examples(positions (B, T)) gives (B, 1, T, T): True where token t may look at token s. "
            "Positions begin at 0 with each example of a row. A token sees its own example, up to itself."
        ),
        calls=mask_calls,
        tests=("tests/test_model.py", "-k", "example or position or mask"),
        mistakes={
            "A token can't see itself: it may.": ("(order <= order[:, None])", "(order < order[:, None])"),
            "The mask is flipped: a token sees what comes after it.": (
                "(order <= order[:, None])",
                "(order >= order[:, None])",
            ),
            "A token looks into the example before its own.": (
                "(begin <= order) & (order <= order[:, None])",
                "(begin >= 0) & (order <= order[:, None])",
            ),
            "A token can't see the first token of its example.": ("(begin <= order)", "(begin < order)"),
            "True and False are swapped: True means that the token may look.": (
                "return (begin <= order) & (order <= order[:, None])",
                "return ~((begin <= order) & (order <= order[:, None]))",
            ),
        },
    ),
    Exercise(
        title="The angles of positions",
        file="model.py",
        names=("angles_of",),
        task=(
            "angles_of(positions (..., T), channels, config) gives (..., T, channels / 2): position * "
            "theta^(-2 i "
            "/ channels) for the pair i. With rope_factor f, Llama 3 divides slow frequencies by f: "
            "those that "
            "turn at most rope_slow times in rope_original tokens; from rope_fast turns on none; "
            "between, mixed."
        ),
        calls=angles_calls,
        tests=("tests/test_model.py", "-k", "rotary or rotat or sinus or angle or position"),
        mistakes={
            "The frequencies grow from pair to pair: the first pair is the fastest.": (
                "1 / config.rope_theta**pairs",
                "config.rope_theta**pairs",
            ),
            "The frequencies fall too slowly: they go from 1 to nearly 1 / theta.": (
                "torch.arange(0, channels, 2, device=positions.device) / channels",
                "torch.arange(channels // 2, device=positions.device) / channels",
            ),
            "An angle is the position times the frequency.": (
                "return positions[..., None] * frequency",
                "return positions[..., None] + frequency",
            ),
            "Fast frequencies are scaled as well: only slow ones are divided by rope_factor.": (
                "(fast + (1 - fast) / config.rope_factor)",
                "(1 / config.rope_factor)",
            ),
            "The share between slow and fast goes below 0 or above 1.": (".clamp(0, 1)", ""),
        },
    ),
    Exercise(
        title="The rotation",
        file="model.py",
        names=("rotate",),
        task=(
            "rotate(x (B, T, heads, hs), cos and sin (B or 1, T, 1, hs / 2)) gives x rotated: channels "
            "i and i + "
            "hs / 2 are a point of the plane, turned by the angle whose cosine and sine are given. The "
            "dtype stays."
        ),
        calls=rotate_calls,
        tests=("tests/test_model.py", "-k", "rotary or rotat"),
        mistakes={
            "The rotation goes the other way round.": (
                "(a * cos - b * sin, b * cos + a * sin)",
                "(a * cos + b * sin, b * cos - a * sin)",
            ),
            "A sign is wrong, so this is no rotation: lengths change.": (
                "(a * cos - b * sin, b * cos + a * sin)",
                "(a * cos - b * sin, b * cos - a * sin)",
            ),
            "The two halves are swapped in the result.": (
                "(a * cos - b * sin, b * cos + a * sin)",
                "(b * cos + a * sin, a * cos - b * sin)",
            ),
            "Neighbouring channels are paired: here channel i goes with channel i + hs / 2.": (
                "a, b = x.float().chunk(2, dim=-1)",
                "a, b = x.float()[..., ::2], x.float()[..., 1::2]",
            ),
            "Only the cosine is used.": (
                "(a * cos - b * sin, b * cos + a * sin)",
                "(a * cos, b * cos)",
            ),
        },
    ),
    Exercise(
        title="A norm",
        file="model.py",
        names=("RMSNorm.forward",),
        task=(
            "forward(x (..., C)) gives x / sqrt(mean of its squares over the channels + self.eps), times "
            "self.weight (C,)."
        ),
        calls=norm_calls,
        tests=("tests/test_model.py", "-k", "norm or family or shape"),
        mistakes={
            "The mean is taken away first: that is LayerNorm; this norm leaves the mean.": (
                "F.rms_norm(x, ",
                "F.rms_norm(x - x.mean(-1, keepdim=True), ",
            ),
            "The weight is missing.": ("self.weight.to(x.dtype), self.eps", "None, self.eps"),
            "eps is missing: it counts where x is small.": ("self.eps)", "0.0)"),
            "The squares are added up, not averaged.": (
                "F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)",
                "x * (x.square().sum(-1, keepdim=True) + self.eps).rsqrt() * self.weight",
            ),
            "The root is missing.": (
                "F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)",
                "x / (x.square().mean(-1, keepdim=True) + self.eps) * self.weight",
            ),
        },
    ),
    Exercise(
        title="The loss",
        file="model.py",
        names=("next_token_loss",),
        task=(
            "next_token_loss(x (N, C), head (V, C), targets (N,), vocab_size) gives one number: the "
            "mean of -log "
            "p(target) in nats, over the tokens whose target is not -1. Rows of head from vocab_size "
            "on (None: "
            "none) are no ids."
        ),
        calls=loss_calls,
        tests=("tests/test_model.py", "-k", "loss"),
        mistakes={
            "The rows that pad the vocabulary count: they are no ids.": ("[:, :vocab_size]", ""),
            "The losses are added up: the mean is wanted.": (
                "ignore_index=-1",
                "ignore_index=-1, reduction='sum'",
            ),
            "The loss is in bits: nats have the natural logarithm.": (
                "return F.cross_entropy(logits, targets, ignore_index=-1)",
                "return F.cross_entropy(logits, targets, ignore_index=-1) / math.log(2)",
            ),
            "Two softmaxes, one after the other: cross_entropy has its own.": (
                "F.cross_entropy(logits, ",
                "F.cross_entropy(logits.softmax(-1), ",
            ),
            "Tokens with the target -1 make the mean smaller: they do not count at all.": (
                "return F.cross_entropy(logits, targets, ignore_index=-1)",
                "return F.cross_entropy(logits, targets, ignore_index=-1, reduction='sum') / len(targets)",
            ),
        },
    ),
    Exercise(
        title="A draw",
        file="kqv/generation/sampling.py",
        names=("Sampler.draw",),
        task=(
            "draw(logits (B, V), uniform (B, 1)) gives one id for each row (B, 1). Where "
            "self.work.greedy, it is "
            "the likeliest. Else divide by self.temperature; keep the self.work.kept likeliest (0: "
            "all); of those "
            "the fewest that reach self.top_p together, and those with self.min_p times the largest "
            "probability; "
            "then invert the cumulative distribution. (Where self.work.rounded, only self.top_k of "
            "the kept count.)"
        ),
        calls=draw_calls,
        tests=("tests/generation/test_sampling.py",),
        mistakes={
            "The logits are multiplied by the temperature: below 1, likelier tokens come more often.": (
                "logits / self.temperature",
                "logits * self.temperature",
            ),
            "The least likely tokens are kept, not the likeliest.": (
                "logits.topk(self.work.kept)",
                "logits.topk(self.work.kept, largest=False)",
            ),
            "top_p leaves out the token that reaches it: the fewest that REACH it stay.": (
                "(before < self.top_p)",
                "(before + p < self.top_p)",
            ),
            "min_p is compared with the probability itself: it is a share of the likeliest token's.": (
                "self.min_p * p[:, :1]",
                "self.min_p",
            ),
            "The random number does not count: the likeliest token comes every time.": (
                "reached = (cdf > uniform * cdf[:, -1:]) & (p > 0)",
                "reached = p == p.amax(dim=-1, keepdim=True)",
            ),
        },
    ),
    Exercise(
        title="A step of beam search",
        file="kqv/generation/beams.py",
        names=("extensions",),
        task=(
            "extensions(logits (P N, V), scores (P, N), vocab_size) gives log-probabilities (P, 2N), "
            "the likeliest "
            "first, and indices (P, 2N), beam * vocab_size + id, of the likeliest extensions of each "
            "prompt's N "
            "beams by a token. Logits that are not finite give NaN."
        ),
        calls=beam_calls,
        tests=("tests/generation/test_beams.py",),
        mistakes={
            "Beams forget how likely they were: a text's log-probability is the sum over its tokens.": (
                "(scores[:, :, None] + logprobs)",
                "(0 * scores[:, :, None] + logprobs)",
            ),
            "Logits are added as they are: they must be log-probabilities, whose exponentials sum to 1.": (
                "logits.log_softmax(dim=-1)",
                "logits",
            ),
            "Probabilities are added to log-probabilities.": (
                "logits.log_softmax(dim=-1)",
                "logits.softmax(dim=-1)",
            ),
            "There are N extensions: 2N are wanted, since N of them may end their text.": (
                "min(2 * N, N * vocab_size)",
                "N",
            ),
            "The least likely extensions are kept.": (
                "min(2 * N, N * vocab_size))",
                "min(2 * N, N * vocab_size), largest=False)",
            ),
        },
    ),
    Exercise(
        title="A step of the optimizer",
        file="exercises/small.py",
        names=("adamw_step",),
        task=(
            "adamw_step(weight, gradient, mean, square, step, lr, betas, eps, decay) gives the new "
            "(weight, mean, "
            "square): running means of the gradient and of its square, both corrected for their "
            "beginning at 0; a "
            "step of lr * mean / (sqrt(square) + eps); and the weight times 1 - lr * decay."
        ),
        calls=adamw_calls,
        tests=("tests/exercises/test_small.py", "-k", "optimizer"),
        mistakes={
            "The first means are too small: they began at 0, and are divided by 1 - beta^step.": (
                "unbiased = mean / (1 - betas[0] ** step)",
                "unbiased = mean",
            ),
            "The mean of the squares is not corrected for its beginning at 0.": (
                "np.sqrt(square / (1 - betas[1] ** step))",
                "np.sqrt(square)",
            ),
            "The root of the mean square is missing.": (
                "np.sqrt(square / (1 - betas[1] ** step))",
                "square / (1 - betas[1] ** step)",
            ),
            "The decay goes through the means: that is Adam with L2. AdamW shrinks the weight itself.": (
                "    mean = betas[0] * mean + (1 - betas[0]) * gradient\n",
                "    gradient, lr_decay, decay = gradient + decay * weight, decay, 0.0\n"
                "    mean = betas[0] * mean + (1 - betas[0]) * gradient\n",
            ),
            "The decay is missing: the weight is multiplied by 1 - lr * decay.": ("(1 - lr * decay)", "1"),
        },
    ),
    Exercise(
        title="Merging two pieces of a BPE",
        file="exercises/small.py",
        names=("merge",),
        task=(
            "merge(ids, pair, new) gives the list of ids with `new` in place of each `pair` of "
            "neighbours, from "
            "left to right."
        ),
        calls=merge_calls,
        tests=("tests/exercises/test_small.py", "-k", "merge or merging"),
        mistakes={
            "Pairs overlap: an id that was merged is not there for the next pair.": (
                "merged.append(new)\n            place += 2",
                "merged.append(new)\n            place += 1",
            ),
            "Only the first pair is merged.": (
                "merged.append(new)\n            place += 2",
                "return [*merged, new, *ids[place + 2 :]]",
            ),
            "The pair stays, beside the new id.": (
                "merged.append(new)\n",
                "merged += [*pair, new]\n",
            ),
            "The order of the pair does not count: (1, 2) is not (2, 1).": (
                "tuple(ids[place : place + 2]) == tuple(pair)",
                "sorted(ids[place : place + 2]) == sorted(pair)",
            ),
            "The ids between the pairs are lost.": (
                "merged.append(ids[place])\n",
                "pass\n",
            ),
        },
    ),
    Exercise(
        title="The cache",
        file="model.py",
        names=("LayerCache.update",),
        task=(
            "update(k and v (B, T, nkv, hs), positions (B, T), span) keeps k and v in self.k and "
            "self.v (B, slots, "
            "nkv, hs), each token in the slot of its position, and gives the first `span` slots of both."
        ),
        calls=cache_calls,
        tests=("tests/test_model.py", "tests/generation/test_engine.py", "-k", "cache"),
        mistakes={
            "Keys are kept where values belong, and the reverse.": (
                "self.k[rows, positions] = k\n        self.v[rows, positions] = v",
                "self.k[rows, positions] = v\n        self.v[rows, positions] = k",
            ),
            "Tokens go into the first slots, not into those of their positions.": (
                "self.k[rows, positions] = k\n        self.v[rows, positions] = v",
                "self.k[:, : k.size(1)] = k\n        self.v[:, : k.size(1)] = v",
            ),
            "All slots are given: only the first `span` are wanted.": (
                "return self.k[:, :span], self.v[:, :span]",
                "return self.k, self.v",
            ),
            "Only the new keys and values are given: tokens look at the older ones, too.": (
                "return self.k[:, :span], self.v[:, :span]",
                "return k, v",
            ),
            "All rows are written at the positions of the first one.": (
                "self.k[rows, positions] = k\n        self.v[rows, positions] = v",
                "self.k[rows, positions[:1]] = k\n        self.v[rows, positions[:1]] = v",
            ),
        },
    ),
    Exercise(
        title="The schedule",
        file="kqv/training/schedule.py",
        names=("learning_rate_at",),
        task=(
            "learning_rate_at(step, config, peak) gives the learning rate of a step: (step + 1) / "
            "(warmup + 1) of "
            "the largest in the warm-up; then last + share * (peak - last), where "
            "SCHEDULES[config.schedule](step, "
            "warmup, cooldown, end) is the share and last_learning_rate(config) the last one, scaled "
            "as the peak is."
        ),
        calls=schedule_calls,
        tests=("tests/training/test_optimizer.py", "-k", "learning_rate or schedule or warm"),
        mistakes={
            "The warm-up begins at 0: the first step would learn nothing.": (
                "peak * (step + 1) / (warmup + 1)",
                "peak * step / warmup",
            ),
            "The schedule goes below min_lr, or begins above the peak.": (
                "last + SCHEDULES[config.schedule](step, warmup, cooldown, end) * (peak - last)",
                "last + SCHEDULES[config.schedule](step, warmup, cooldown, end) * peak",
            ),
            "The schedule ends at max_iters: lr_decay_iters says where, if it is given.": (
                "config.max_iters if config.lr_decay_iters is None else config.lr_decay_iters",
                "config.max_iters",
            ),
            "There is no warm-up.": (
                "    if step < warmup:\n        return peak * (step + 1) / (warmup + 1)\n",
                "",
            ),
            (
                "A group with a peak of its own ends at the run's min_lr: it ends at the same share "
                "of its peak."
            ): (
                "share * last_learning_rate(config)",
                "last_learning_rate(config)",
            ),
        },
    ),
)
