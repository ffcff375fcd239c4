"""
What a training step on many GPUs takes, by arithmetic: memory of each GPU, bytes sent between them, seconds.

It describes what train.py does: float32 weights, gradients and moments, products in bfloat16, and each
process with the whole model (DDP) or with a part of it (FSDP, see kqv/training/world.py). Sizes are
counted in a model on the meta device, which has shapes and no numbers, so a change of model.py needs none
here.
"""

import functools
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

from kqv.formats import lora
from kqv.training import loss
from model import GPT, GPTConfig


@dataclass(frozen=True)
class Job:
    """How a model is trained."""

    shape: GPTConfig
    gpus: int = 1  # each with a process
    gpus_per_node: int = 8
    sharded: bool = False  # FSDP
    batch_size: int = 1  # sequences in a micro-batch
    accumulation: int = 1  # micro-batches of each process in a step
    checkpointing: bool = False
    muon: bool = False
    compiled: bool = False
    itemsize: int = 2  # bytes of a number in matrix products and the stream: 2 in bfloat16, 4 in float32
    norm_itemsize: int = 0  # of a number that goes into LayerNorm; 0: itemsize
    lora_rank: int = 0  # of adapters that are trained, and nothing else; 0: all weights are
    lora_targets: tuple = lora.LAYERS

    @property
    def model(self):
        """A GPT on the meta device."""
        return model_of(self.shape, self.lora_rank, self.lora_targets)

    @property
    def tokens(self):
        """Tokens in a micro-batch."""
        return self.batch_size * self.shape.block_size

    @property
    def nodes(self):
        return -(-self.gpus // self.gpus_per_node)

    @property
    def shards(self):
        """
        How many processes share one copy of the model: those of a node; all, where there is one node or each
        node has one GPU.
        """
        if not self.sharded:
            return 1
        return self.gpus_per_node if 1 < self.gpus_per_node < self.gpus else self.gpus

    @property
    def weight_itemsize(self):
        """Bytes of a weight that the model computes with: FSDP gathers it in the precision of products."""
        return self.itemsize if self.sharded else 4


@dataclass(frozen=True)
class Cluster:
    """What a GPU and its links do at best."""

    peak_flops: float  # FLOP/s
    node_bandwidth: float  # bytes/s of a GPU to the others of its node, in each direction
    network_bandwidth: float  # bytes/s of a GPU to other nodes, in each direction


# Counted in the model


@functools.lru_cache(maxsize=64)
def model_of(shape, lora_rank=0, lora_targets=lora.LAYERS):
    """A GPT of that shape on the meta device, adapted where there is a rank."""
    with torch.device("meta"):
        gpt = GPT(shape)
    return lora.adapt(gpt, lora_rank, 1.0, lora_targets) if lora_rank else gpt


def count(module):
    """How many parameters a module has; tied ones count once."""
    return sum(parameter.numel() for parameter in module.parameters())


def learnt(module):
    """How many of them are trained."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def linear_layers(module):
    return [part for part in module.modules() if isinstance(part, nn.Linear)]


def block_activations(job):
    """Bytes that autograd keeps of one block for its backward pass."""
    alone = replace(job.shape, n_layer=1, vocab_size=1, dropout=0.0)
    itemsizes = job.itemsize, job.norm_itemsize or job.itemsize
    return job.batch_size * sequence_activations(alone, *itemsizes, job.lora_rank, job.lora_targets)


@functools.lru_cache(maxsize=64)
def sequence_activations(shape, itemsize, norm_itemsize, lora_rank, lora_targets):
    """
    Bytes that autograd keeps of a block for each sequence: what two sequences keep, minus what one keeps. So
    weights and autocast's copies of them do not count. The block runs on tensors without numbers, with the
    fused attention (Dao et al. 2022).
    """
    dtypes = {2: torch.bfloat16, 4: torch.float32}

    def kept(batch_size):
        storages = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            storages[storage._cdata] = storage  # many tensors may be views of one storage
            return tensor

        size = (batch_size, shape.block_size, shape.n_embd)
        x = torch.empty(size, dtype=dtypes[norm_itemsize], requires_grad=True)  # (B, T, C)
        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16, enabled=itemsize == 2),
            sdpa_kernel(SDPBackend.FLASH_ATTENTION),
        ):
            block(x, rotation=rotation)
        return sum(storage.nbytes() for storage in storages.values())

    with FakeTensorMode():
        gpt = GPT(shape)
        if lora_rank:
            lora.adapt(gpt, lora_rank, 1.0, lora_targets)
        block = gpt.transformer.h[0]
        idx = torch.zeros(1, shape.block_size, dtype=torch.long)
        _, rotation = gpt.embed(idx, torch.arange(shape.block_size)[None])
        return kept(2) - kept(1)


# Memory


def loss_memory(job):
    """
    Bytes that kqv/training/loss.py holds at its peak. Of each logit in bfloat16 that is 2 for itself, and not
    compiled 4 for its float32 score and 4 for the exponential; at once, 2 for the gradient, too. Compiled, a
    logit and its gradient are all that is stored, and at once, the one in the place of the other. Chunks need
    the gradients that they add to, besides.
    """
    V, C = job.model.lm_head.weight.shape
    learns = job.lora_rank == 0  # else the head has no gradient
    chunks, rows = loss.split(job.tokens, V, job.compiled)
    if chunks == 1:
        return (
            rows * V * (job.itemsize if job.compiled else 12) + job.compiled * learns * V * C * job.itemsize
        )
    of_a_logit = 2 * job.itemsize if job.compiled else {2: 10, 4: 8}[job.itemsize]
    return of_a_logit * rows * V + learns * 4 * V * C + job.itemsize * chunks * rows * C


def peak_bytes(job):
    """The most bytes that each GPU holds."""
    return sum(highest_peak(job)[1].values())


def highest_peak(job):
    """(when a step holds most, {part: bytes} on each GPU then)."""
    return max(peaks(job).items(), key=lambda peak: sum(peak[1].values()))


def peaks(job):
    """
    {when: {part: bytes}} of the three times of a step that can hold most: the loss at the end of the forward
    pass, a block's backward pass, and the end of the backward pass.
    """
    gpt, seen = job.model, job.weight_itemsize
    layers, N, trained = len(gpt.transformer.h), count(gpt), learnt(gpt)
    block, outside_blocks = count(gpt.transformer.h[-1]), N - count(gpt.transformer.h)
    head, tied = learnt(gpt.lm_head), job.shape.tied_head
    matrices = sum(p.numel() for p in gpt.transformer.h.parameters() if p.dim() == 2 and p.requires_grad)
    of_optimizer = 4 * (2 * trained - job.muon * matrices)  # AdamW's two moments, or Muon's one
    always = {"weights": 4 * N / job.shards, "optimizer": of_optimizer / job.shards}
    # The sum over earlier micro-batches, which FSDP too keeps whole, or the buckets of DDP.
    kept = 4 * trained * (job.accumulation > 1 or job.gpus > 1 and not job.sharded)
    if job.sharded:
        copies = copies_later = seen * (outside_blocks + 2 * block)  # gathered: this block and the next one
        reducing, blocks_left = (seen if kept else 4) * block, layers - 1  # the gradient of the last block
    else:
        # Autocast casts the weights of products, and keeps them to the end of the forward pass or longer.
        cast = linear_layers(gpt)
        if job.lora_rank:  # what goes into the first of them needs no gradient, for which its weight is kept
            cast.remove(gpt.transformer.h[0].attn.c_attn)
        copies = 2 * sum(map(count, cast)) if job.itemsize == 2 else 0
        copies_later = copies / layers if job.checkpointing else copies
        reducing, blocks_left = 0, layers
    stream = job.tokens * job.shape.n_embd * job.itemsize  # what goes into a block
    # The input and output of ln_f. With frozen ends, its output and the first block's input are not kept.
    ends = (job.checkpointing if job.lora_rank else 2) * stream
    in_block, again = block_activations(job), 0
    if job.checkpointing:  # a block is computed again, beside the largest gradient within it
        widest = max(layer.out_features for layer in linear_layers(gpt.transformer.h[-1]))
        in_block, again = stream, in_block + job.tokens * widest * job.itemsize
    return {
        "the loss": {
            **always,
            "gradients": kept,
            "copies": copies,
            "activations": layers * in_block + ends,
            "loss": loss_memory(job),
        },
        "a block's backward pass": {
            **always,
            "gradients": kept + seen * head + reducing,
            "copies": copies_later,
            "activations": blocks_left * in_block + ends + again,
        },
        # A tied matrix has two gradients until they are added.
        "the end of the backward pass": {**always, "gradients": 4 * (trained + head * tied) / job.shards},
    }


# Communication and time


def traffic(job):
    """
    {phase: (bytes within a node, bytes between nodes)} that each GPU sends, and receives as many: in a
    micro-batch's forward and backward pass, and when a step's gradients are reduced.

    A ring of k passes on (k - 1) / k of what it gathers or reduce-scatters, and twice that to all-reduce.
    Where it spans nodes, each of the m GPUs of a node takes 1 / m of the way between them.
    """
    gpt, seen = job.model, job.weight_itemsize
    N, blocks = learnt(gpt), count(gpt.transformer.h)
    near, far = min(job.gpus, job.gpus_per_node), job.nodes  # GPUs in a node, nodes

    def ring(count):
        return (count - 1) / count

    between = 2 * ring(far) * 4 * N / near
    if not job.sharded:
        return {"forward": (0, 0), "backward": (0, 0), "reduce": (2 * ring(near) * 4 * N, between)}
    forward, backward = ring(job.shards) * seen * N, ring(job.shards) * seen * blocks
    scattered = ring(job.shards) * 4 * N
    if near == 1:  # one GPU in each node: all goes through the network
        return {"forward": (0, forward), "backward": (0, backward), "reduce": (0, scattered)}
    return {"forward": (forward, 0), "backward": (backward, 0), "reduce": (scattered, between)}


def step_seconds(job, cluster, mfu):
    """
    (least seconds of a step, seconds of its computing alone), if computing alone reaches `mfu` of the peak.

    Communication and computing overlap: weights are gathered while the same micro-batch computes, gradients
    are reduced during the last one's backward pass. The backward pass takes twice the forward pass's time
    without what frozen weights save, and once more where activations are computed again.
    """
    speed = mfu * cluster.peak_flops
    forward = job.tokens * job.model.flops_per_token() / speed / 3
    backward = job.tokens * lora.flops_per_token(job.model) / speed - forward
    backward += forward * job.checkpointing
    sent = traffic(job)

    def links(*phases):
        node, network = (sum(sent[phase][place] for phase in phases) for place in (0, 1))
        return max(node / cluster.node_bandwidth, network / cluster.network_bandwidth)

    least = job.accumulation * max(forward, links("forward"))
    least += (job.accumulation - 1) * max(backward, links("backward"))
    least += max(backward, links("backward", "reduce"))
    return least, job.accumulation * (forward + backward)
