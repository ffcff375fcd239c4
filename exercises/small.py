"""Three small programs that the project itself takes from libraries: read them, then write them."""

import math
from collections import Counter

import numpy as np


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


class Network:
    """
    The network that many learn first (Rumelhart et al. 1986): layers of neurons, each the sigmoid of a
    weighted sum. With `sizes` (64, 30, 10) it reads 8 x 8 pixels and gives ten numbers, one a digit. Its cost
    for one image is |a - y|^2 / 2, of its output a and the wanted y.
    """

    def __init__(self, sizes, seed=0):
        random = np.random.default_rng(seed)
        self.biases = [random.standard_normal(n) for n in sizes[1:]]  # (n,) of each layer
        self.weights = [  # (n, m) of each layer: from m neurons to n
            random.standard_normal((n, m)) / math.sqrt(m) for m, n in zip(sizes, sizes[1:], strict=False)
        ]

    def feedforward(self, a):
        """Pixels a (m,) -> the output of the last layer (n,)."""
        for weight, bias in zip(self.weights, self.biases, strict=True):
            a = sigmoid(weight @ a + bias)
        return a

    def backprop(self, x, y):
        """
        Pixels x (m,), wanted output y (n,) -> the gradient of the cost for each of self.biases, and for each
        of self.weights: two lists of arrays, of the same shapes as those.
        """
        activations = [x]  # of each layer
        for weight, bias in zip(self.weights, self.biases, strict=True):
            activations.append(sigmoid(weight @ activations[-1] + bias))
        grad_biases, grad_weights = [], []
        error = activations[-1] - y  # the gradient of the cost by the output
        for layer in reversed(range(len(self.weights))):
            a = activations[layer + 1]
            delta = error * a * (1 - a)  # by the weighted sum: sigmoid'(z) = a (1 - a)
            grad_biases.insert(0, delta)
            grad_weights.insert(0, np.outer(delta, activations[layer]))
            error = self.weights[layer].T @ delta  # by the output of the layer before
        return grad_biases, grad_weights

    def update_mini_batch(self, batch, eta):
        """One step of gradient descent on `batch`, a list of (x, y): by the mean gradient, times eta."""
        gradients = [self.backprop(x, y) for x, y in batch]
        for layer in range(len(self.weights)):
            self.biases[layer] = self.biases[layer] - eta * np.mean([b[layer] for b, _ in gradients], axis=0)
            self.weights[layer] = self.weights[layer] - eta * np.mean(
                [w[layer] for _, w in gradients], axis=0
            )


def adamw_step(weight, gradient, mean, square, step, lr, betas=(0.9, 0.95), eps=1e-8, decay=0.1):
    """
    A step of AdamW (Loshchilov & Hutter 2017), number `step`, from 1 on. weight, gradient, and the running
    means of the gradient and of its square: arrays of one shape -> the new (weight, mean, square).
    """
    mean = betas[0] * mean + (1 - betas[0]) * gradient
    square = betas[1] * square + (1 - betas[1]) * gradient**2
    unbiased = mean / (1 - betas[0] ** step)  # both began at 0, and are too small at first
    spread = np.sqrt(square / (1 - betas[1] ** step))
    return weight * (1 - lr * decay) - lr * unbiased / (spread + eps), mean, square


def most_frequent_pair(ids):
    """The pair of neighbours in a list of ids that is there most often; of several, the smallest."""
    pairs = Counter(zip(ids, ids[1:], strict=False))
    return min(pairs, key=lambda pair: (-pairs[pair], pair))


def merge(ids, pair, new):
    """
    A step of byte-pair encoding (Sennrich et al. 2016): the list of ids with `new` in place of each `pair` of
    neighbours, from left to right.
    """
    merged, place = [], 0
    while place < len(ids):
        if tuple(ids[place : place + 2]) == tuple(pair):
            merged.append(new)
            place += 2
        else:
            merged.append(ids[place])
            place += 1
    return merged
