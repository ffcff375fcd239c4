"""
The part of bench.py gpu for numbers: what the project computes in its own way on a GPU, beside float64. Its
error may be little more than that of torch's own operations in the same precision.
"""

import copy
from dataclasses import replace
from itertools import product

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from kqv.measuring.gpu_job import patched
from kqv.measuring.plain import cross_entropy_of_all
from kqv.measuring.presets import PRESETS
from kqv.training import loss
from kqv.training.objective import set_precision
from model import GPT, MLP, GPTConfig, KVCache, NextToken

TIMES = 2.0  # the error of torch's own operations that is allowed
LEAST = {torch.float32: 1e-5, torch.bfloat16: 1e-3}  # relative error that is always allowed
FAMILIES = ("124M", "smollm2-135M", "qwen3-0.6B")


def check_kernels(job):
    """A line for each kind of work, with its relative error and that of torch's operations."""
    set_precision(job.train.TrainSettings(), job.device)
    for check in (check_loss, check_conversations, check_decoding, check_mlp):
        with job.reporting(check.__name__.removeprefix("check_")):
            check(job)


def compare(job, what, own, usual, right, names, dtype=torch.bfloat16):
    """
    A line of the largest errors of tensors computed in `dtype`: our `own`, those in the `usual` way, and the
    `right` ones in float64; `names` says what each is. It fails where one of ours is off by more than TIMES
    the usual error.
    """
    errors, wrong = [], []
    for name, *parts, exact in zip(names, own, usual, right, strict=True):
        error, other = (((part.double() - exact).norm() / exact.norm()).item() for part in parts)
        errors.append((error, other))
        if not error <= max(LEAST[dtype], TIMES * other):
            wrong.append(f"{name} is off by {error:.2g} of its size, in the usual way by {other:.2g}")
    figures = {"failed": "; ".join(wrong)} if wrong else {}
    job.emit(what, error=max(errors)[0], **{"usual error": max(errors)[1]}, **figures)


def with_gradients(function, *inputs):
    """[function(*inputs), a number, and its gradients of those inputs that need one]."""
    value = function(*inputs)
    return [value.detach(), *torch.autograd.grad(value, [part for part in inputs if part.requires_grad])]


def check_loss(job):
    """The loss in four chunks, and compiled."""
    N, C, V = (512, 32, 256) if job.quick else (8192, 768, 50304)
    torch.manual_seed(0)
    with torch.device(job.device):
        x, head = (torch.randn(rows, C).mul_(std).requires_grad_() for rows, std in ((N, 1.0), (V, 0.1)))
        targets = torch.randint(V, (N,))
        targets[::7] = -1
    exact = [x.detach().double().requires_grad_(), head.detach().double().requires_grad_(), targets]
    right = with_gradients(plain_loss, *exact)
    functions = {"loss": loss.next_token_loss}
    if job.device.type == "cuda":
        functions["loss, compiled"] = torch.compile(loss.next_token_loss)
    sizes = [name for name in vars(loss) if name.startswith("LOGITS_AT_ONCE")]
    chunks = {f"kqv.training.loss.{name}": N * V // 4 for name in sizes}
    for what, function in functions.items():
        with patched(chunks), torch.autocast(job.device.type, torch.bfloat16):
            own, usual = (with_gradients(each, x, head, targets) for each in (function, plain_loss))
        compare(job, what, own, usual, right, ("the loss", "its gradient of x", "its gradient of the head"))


def plain_loss(x, head, targets):
    counts = targets >= 0
    return cross_entropy_of_all(x[counts], head, targets[counts])


def check_conversations(job):
    """
    Training on packed conversations, of a length and with scores for which a kernel of cuDNN gave NaN
    (pytorch #196678).
    """
    shape = GPTConfig(192, 256, 2, 2, 128, bias=False)
    torch.manual_seed(0)
    gpt = GPT(shape).to(job.device)
    for block in gpt.transformer.h:
        query, key, _ = block.attn.c_attn.weight.data.chunk(3)
        query.mul_(16)
        key.copy_(-query)  # a token's score of itself is far below -88.7
    idx, targets = (torch.randint(shape.vocab_size, (4, 192), device=job.device) for _ in range(2))
    positions = (torch.arange(192, device=job.device) % 50).expand(4, 192)

    def gradients(gpt):
        return with_gradients(lambda *_: NextToken(gpt)(idx, targets, positions), *gpt.parameters())

    with torch.autocast(job.device.type, torch.bfloat16):
        own = gradients(gpt)
        with sdpa_kernel(SDPBackend.MATH):
            usual = gradients(gpt)
    names = ("the loss", *(f"the gradient of {name}" for name, _ in gpt.named_parameters()))
    exact = gradients(copy.deepcopy(gpt).double())
    compare(job, "conversations", own, usual, exact, names)
    from kqv.kernels.attention import attend_within_examples

    if not attend_within_examples(gpt, 4, job.device, torch.bfloat16):
        job.emit("conversations, by borders", skipped=f"there is no kernel for it on {job.device}")
        return
    with torch.autocast(job.device.type, torch.bfloat16):
        compare(job, "conversations, by borders", gradients(gpt), usual, exact, names)


def check_mlp(job):
    """The MLP whose products do the work between them, with each activation that it knows."""
    from kqv.training.fused_mlp import not_fused

    if reason := not_fused(GPTConfig(), job.device, torch.bfloat16):
        job.emit("mlp", skipped=f"it {reason}")
        return
    from kqv.kernels.mlp import FusedMLP

    N = 256 if job.quick else 16384
    for activation in ("gelu", "relu2"):
        shape = GPTConfig(n_embd=64 if job.quick else 768, n_head=1, activation=activation)
        torch.manual_seed(0)
        with torch.device(job.device):
            mlp, fused = MLP(shape), FusedMLP(shape)
            x, weight = torch.randn(1, N, shape.n_embd, requires_grad=True), torch.randn(shape.n_embd)
        fused.load_state_dict(mlp.state_dict())

        def gradients(mlp, x):
            inputs = x, *mlp.parameters()
            return with_gradients(lambda x, *_: (mlp(x).double() @ weight.double()).sum() / N, *inputs)  # noqa: B023

        with torch.autocast(job.device.type, torch.bfloat16):
            own, usual = gradients(fused, x), gradients(mlp, x)
        names = (
            "the output",
            "the gradient of x",
            *(f"that of {name}" for name, _ in mlp.named_parameters()),
        )
        exact = gradients(mlp.double(), x.detach().double().requires_grad_())
        compare(job, f"mlp, {activation}", own, usual, exact, names)


@torch.no_grad()
def check_decoding(job):
    """A step of decoding by kernels, for shapes of several families, two blocks of each."""
    from kqv.kernels.decoding import KernelDecoder, why_not

    torch.set_float32_matmul_precision("highest")  # not TF32
    batch_size, slots, T = (2, 64, 40) if job.quick else (8, 1024, 600)
    for family, dtype in product(FAMILIES, (torch.float32, torch.bfloat16)):
        shape = replace(PRESETS[family].shape, n_layer=2, block_size=slots)
        if job.quick:
            shape = replace(shape, vocab_size=128, n_embd=48, n_head=3, n_kv_head=1, head_size=16, n_inner=96)
        what = f"decoding, {family}, {str(dtype).removeprefix('torch.')}"
        torch.manual_seed(0)
        gpt = GPT(shape).to(job.device, dtype).eval()
        if reason := why_not(gpt, job.device):
            job.emit(what, skipped=reason)
            continue
        idx = torch.randint(shape.vocab_size, (batch_size, T + 1), device=job.device)

        def logits(gpt, decode):
            cache = KVCache(gpt.config, batch_size, slots, job.device, gpt.lm_head.weight.dtype)
            cache.span = T
            gpt.hidden(idx[:, :T], cache=cache)  # noqa: B023
            cache.span = slots
            return [decode(idx[:, T:].contiguous(), cache=cache).reshape(batch_size, -1)]  # noqa: B023

        own, usual = logits(gpt, KernelDecoder(gpt)), logits(gpt, gpt)
        gpt = gpt.double()
        compare(job, what, own, usual, logits(gpt, gpt), ["the output"], dtype)
