"""
What training on many GPUs takes, by arithmetic alone: memory of each, bytes between them, days.

It plans what train.py does: float32 weights, gradients and AdamW moments, products in bfloat16, and each
process with the whole model (DDP) or with a part of it (FSDP, see kqv/distributed.py).

Letters: N parameters; B sequences in a micro-batch, T tokens in each, C channels, nh heads, L blocks,
V vocabulary; g GPUs with a process each, m of them in a node, s that share one copy of the model.
"""

import math
from dataclasses import dataclass, replace

from kqv.training import loss
from model import GPTConfig

LARGE = {  # shapes beyond those that bench.py measures (GPT-3's, Brown et al. 2020, table 2.1)
    "2.7B": GPTConfig(2048, 50304, 32, 32, 2560, bias=False),
    "7B": GPTConfig(2048, 50304, 32, 32, 4096, bias=False),
}


@dataclass(frozen=True)
class Job:
    """How a model is trained. `itemsize` is the bytes of a number in products, 2 in bfloat16."""

    shape: GPTConfig
    gpus: int = 1
    gpus_per_node: int = 8
    sharded: bool = False  # FSDP
    batch_size: int = 1
    accumulation: int = 1  # micro-batches of each process in a step
    checkpointing: bool = False
    compiled: bool = False
    itemsize: int = 2
    norm_itemsize: int = 4  # of what LayerNorm reads: a GPU's autocast has it in float32, a CPU's as it comes

    @property
    def tokens(self):
        """In a micro-batch."""
        return self.batch_size * self.shape.block_size

    @property
    def nodes(self):
        return -(-self.gpus // self.gpus_per_node)

    @property
    def shards(self):
        """How many processes share one copy of the model: those of a node, or where each has a node, all."""
        if not self.sharded:
            return 1
        return self.gpus_per_node if 1 < self.gpus_per_node < self.gpus else self.gpus


@dataclass(frozen=True)
class Cluster:
    """What a GPU and its links do at best: FLOP/s and bytes/s, the links' in each direction."""

    flops: float
    node_bandwidth: float
    network_bandwidth: float


def parameters(shape):
    """(in one block, outside the blocks: embeddings and the last LayerNorm)."""
    C, biases = shape.n_embd, 11 * shape.n_embd if shape.bias else 0
    block = 12 * C**2 + 2 * C + biases
    return block, (shape.vocab_size + shape.block_size + 1 + shape.bias) * C


def num_parameters(shape):
    block, rest = parameters(shape)
    return shape.n_layer * block + rest


def block_activations(job):
    """
    Bytes that autograd keeps of one block for its backward pass: for each token

        LayerNorm   C numbers that go in, two times; mean and deviation of each in float32
        attention   C in, 3C q, k and v, C out; nh normalisers of its softmax in float32
        MLP         C in, 4C before GELU, 4C after it
    """
    C, nh = job.shape.n_embd, job.shape.n_head
    return job.tokens * (2 * C * job.norm_itemsize + 14 * C * job.itemsize + 4 * nh + 16)


def loss_memory(job):
    """
    Bytes that loss.py holds at its peak: 12 for each of a chunk's logits (in bfloat16 themselves 2, float32
    scores 4, exponentials 4, the gradient of the chunk before 2), and for chunks the weight's gradient.
    Compiled, no float32 is stored, and a single chunk's gradient takes its logits' place.
    """
    V, C = job.shape.vocab_size, job.shape.n_embd
    chunks = -(-job.tokens * V // loss.LOGITS_AT_ONCE)
    of_a_logit = job.itemsize * (1 if chunks == 1 else 3) if job.compiled else 12
    of_logits = of_a_logit * -(-job.tokens // chunks) * V
    if chunks == 1:
        return of_logits + job.compiled * V * C * job.itemsize
    return of_logits + 4 * V * C + job.tokens * C * job.itemsize


def weight_itemsize(job):
    """Bytes of a weight that the model sees: FSDP gathers it as products want it."""
    return job.itemsize if job.sharded else 4


def memory(job):
    """(the fullest moment of a step, {part: bytes} on each GPU then)."""
    return max(moments(job).items(), key=lambda moment: sum(moment[1].values()))


def total(job):
    """The most bytes that each GPU holds."""
    return sum(memory(job)[1].values())


def moments(job):
    """
    {moment: {part: bytes}}, of the three that can be the fullest: the loss at the end of the forward pass,
    a block's backward pass, and the end of the backward pass.
    """
    shape, seen = job.shape, weight_itemsize(job)
    block, rest = parameters(shape)
    N, head = num_parameters(shape), shape.vocab_size * shape.n_embd  # head: lm_head, which is wte too
    always = {"weights": 4 * N / job.shards, "optimizer": 8 * N / job.shards}
    # What earlier micro-batches have summed up, which FSDP too keeps whole, or DDP's buckets.
    kept = 4 * N * (job.accumulation > 1 or job.gpus > 1 and not job.sharded)
    if job.sharded:
        copies = copies_later = seen * (rest + 2 * block)  # what is in no block, a block, and the next one
        reducing, blocks_left = (seen if kept else 4) * block, shape.n_layer - 1  # that of the last block
    else:
        copies = 2 * (N - shape.block_size * shape.n_embd) if job.itemsize == 2 else 0  # autocast's
        copies_later = copies / shape.n_layer if job.checkpointing else copies
        reducing, blocks_left = 0, shape.n_layer
    stream = job.tokens * shape.n_embd * (seen if job.sharded else 4)  # what goes into a block
    in_block, again = block_activations(job), 0
    if job.checkpointing:  # a block is computed again, and the largest gradient in it has 4C for each token
        in_block, again = stream, in_block + 4 * job.tokens * shape.n_embd * job.itemsize
    return {
        "the loss": {
            **always,
            "gradients": kept,
            "copies": copies,
            "activations": shape.n_layer * in_block + 2 * stream,  # and what goes into ln_f and out
            "loss": loss_memory(job),
        },
        "a block's backward pass": {
            **always,
            "gradients": kept + seen * head + reducing,
            "copies": copies_later,
            "activations": blocks_left * in_block + 2 * stream + again,
        },
        # The tied matrix has two gradients until they are added.
        "the end of the backward pass": {**always, "gradients": 4 * (N + head) / job.shards},
    }


def traffic(job):
    """
    {phase: (bytes within a node, bytes between nodes)} that each GPU sends, and receives as many: in a
    micro-batch's forward and backward pass, and when a step's gradients are reduced.

    A ring of k passes on (k - 1) / k of what it gathers or reduce-scatters, and twice that to all-reduce.
    Where it spans nodes, each GPU of a node takes 1 / m of the way between them.
    """
    block, rest = parameters(job.shape)
    blocks, seen = job.shape.n_layer * block, weight_itemsize(job)
    near, far = min(job.gpus, job.gpus_per_node), job.nodes  # GPUs in a node, nodes

    def ring(count):
        return (count - 1) / count

    gradients = 4 * (blocks + rest)
    between = 2 * ring(far) * gradients / near
    if not job.sharded:
        return {"forward": (0, 0), "backward": (0, 0), "reduce": (2 * ring(near) * gradients, between)}
    forward, backward = ring(job.shards) * seen * (blocks + rest), ring(job.shards) * seen * blocks
    scattered = ring(job.shards) * gradients
    if near == 1:  # one GPU in each node: all comes by the network
        return {"forward": (0, forward), "backward": (0, backward), "reduce": (0, scattered)}
    return {"forward": (forward, 0), "backward": (backward, 0), "reduce": (scattered, between)}


def flops_per_token(shape):
    """As GPT.flops_per_token."""
    block, rest = parameters(shape)
    without_positions = shape.n_layer * block + rest - shape.block_size * shape.n_embd
    return 6 * without_positions + 12 * shape.n_layer * shape.n_embd * shape.block_size


def step_seconds(job, cluster, mfu):
    """
    (seconds of a step at least, those of its computing alone), if computing alone reaches `mfu` of the peak.

    Links and multiplications work at the same time: gathering is hidden by the same micro-batch's computing,
    reducing by the last one's backward pass. The backward pass takes twice the forward's time, and once more
    where activations are computed again.
    """
    forward = job.tokens * flops_per_token(job.shape) / (mfu * cluster.flops) / 3
    backward = forward * (3 if job.checkpointing else 2)
    sent = traffic(job)

    def links(*phases):
        node, network = (sum(sent[phase][place] for phase in phases) for place in (0, 1))
        return max(node / cluster.node_bandwidth, network / cluster.network_bandwidth)

    most = job.accumulation * max(forward, links("forward"))
    most += (job.accumulation - 1) * max(backward, links("backward"))
    most += max(backward, links("backward", "reduce"))
    return most, job.accumulation * (forward + backward)


def fit(job, batch_size, tokens_per_step, limit):
    """
    The job with `batch_size`, 0: with the largest power of two, that `limit` bytes hold, and about
    `tokens_per_step`. None where it does not fit.
    """
    sequences = max(1, round(tokens_per_step / job.shape.block_size / job.gpus))
    sizes = [batch_size] if batch_size else [2**power for power in range(sequences.bit_length())]
    fitting = [with_batch(job, size, tokens_per_step) for size in sizes]
    return next((job for job in reversed(fitting) if total(job) <= limit), None)


def with_batch(job, batch_size, tokens_per_step):
    """The job with that batch_size, and the accumulation that comes nearest to `tokens_per_step`."""
    accumulation = max(1, round(tokens_per_step / batch_size / job.shape.block_size / job.gpus))
    return replace(job, batch_size=batch_size, accumulation=accumulation)


def report(job, cluster, mfu, tokens=0):
    """{what: {name: figure}} of a job and of a run over `tokens`, by default 20 a parameter."""
    N = num_parameters(job.shape)
    tokens = tokens or 20 * N
    step, computing = step_seconds(job, cluster, mfu)
    tokens_per_step = job.tokens * job.accumulation * job.gpus
    seconds = tokens / tokens_per_step * step
    moment, parts = memory(job)
    phases = traffic(job)
    within, between = (
        job.accumulation * (phases["forward"][place] + phases["backward"][place]) + phases["reduce"][place]
        for place in (0, 1)
    )
    limit = "computing" if math.isclose(step, computing) else "communication"
    memory_gb = {part: size / 1e9 for part, size in parts.items()}
    return {
        "model": {"parameters": N, "GFLOP a token": flops_per_token(job.shape) / 1e9},
        "GPUs": {"number": job.gpus, "parallel": "fsdp" if job.sharded else "ddp", "to a copy": job.shards},
        "memory of each, GB": {**memory_gb, "in all": sum(memory_gb.values()), "fullest at": moment},
        "a step": {
            "batch_size": job.batch_size,
            "gradient_accumulation_steps": job.accumulation * job.gpus,
            "tokens": tokens_per_step,
        },
        "each sends in a step, GB": {"within its node": within / 1e9, "to other nodes": between / 1e9},
        f"at most, if computing alone has an MFU of {mfu:g}": {
            "tokens/s": round(tokens_per_step / step),
            "ms a step": step * 1e3,
            "of them computing": computing * 1e3,
            "limited by": limit,
        },
        "a run at that speed": {
            "tokens": int(tokens),
            "steps": math.ceil(tokens / tokens_per_step),
            "days": seconds / 86400,
            "GPU hours": seconds / 3600 * job.gpus,
        },
    }
