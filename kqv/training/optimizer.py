"""
The optimizer: its settings, how it is made, the steps that it skips, its saved state.

To use another optimizer, change `make_optimizer`: the other functions work with any torch.optim.Optimizer.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from kqv.errors import UserError
from kqv.formats.tensors import dense
from kqv.settings import setting
from kqv.training.muon import Muon, muon_groups
from kqv.training.schedule import learning_rate_at, momentum_at
from kqv.training.sharding import full_tensor, local_part, shard_like


@dataclass(frozen=True)
class OptimizerSettings:
    """Optimizer"""

    optimizer: Literal["adamw", "muon"] = setting(
        "adamw", "AdamW for all parameters, or Muon for the matrices of the blocks and AdamW for the others"
    )
    weight_decay: float = setting(1e-1, "AdamW's, on matrices and embeddings", at_least=0.0)
    beta1: float = setting(0.9, "AdamW's momentum", at_least=0.0, below=1.0)
    beta2: float = setting(0.95, "AdamW's momentum of the squares", at_least=0.0, below=1.0)
    max_bad_steps: int = setting(
        20, "skipped steps in a row (non-finite gradient) that end the run", at_least=1
    )
    grad_clip: float = setting(1.0, "largest norm of the gradient; 0: no clipping", at_least=0.0)


def make_optimizer(gpt, config, spread):
    """
    AdamW (Loshchilov & Hutter 2017), whose fused kernel updates all weights at once, or Muon. `spread` is
    World.spread.
    """
    betas = config.beta1, config.beta2
    if config.optimizer == "muon":
        return Muon(muon_groups(gpt, config), betas, spread)
    groups = parameter_groups(gpt, config.weight_decay)
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, fused=True)


def parameter_groups(gpt, weight_decay):
    """For AdamW: matrices and embeddings decay, biases and the weights of norms (1-D) do not."""
    parameters = [parameter for parameter in gpt.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


def training_bytes(model):
    """
    Bytes of float32 that training holds of a model at most: weights, and of those that are not frozen
    gradients and AdamW's two moments. Muon keeps one mean of a matrix in their place.
    """
    return sum(4 * weight.numel() * (4 if weight.requires_grad else 1) for weight in model.parameters())


# The learning rate


def set_learning_rates(optimizer, step, config):
    """Set each group's learning rate, and momentum, to that of the step. Returns the rate to log."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate_at(step, config, group.get("peak"))
        if group.get("rows"):
            group["momentum"] = momentum_at(step, config)
    return learning_rate_at(step, config)


# Clipping, and bad steps


def norm_of_gradients(parameters):
    """The norm of all gradients together, in which one that is not finite shows."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return full_tensor(torch.nn.utils.get_total_norm(gradients))


def step_unless(bad, optimizer, norm=None, grad_clip=0.0):
    """
    Update the weights, unless `bad`: a tensor of one bool, on the device. A skipped step changes neither a
    weight nor the optimizer's state. Gradients whose `norm` is above `grad_clip`, if that is not 0, are
    divided by norm / grad_clip (Pascanu et al. 2013).
    """
    scale = (norm / grad_clip).clamp(min=1.0) if grad_clip else None
    # A fused optimizer reads `found_inf` and `grad_scale` on the device, so the host need not wait, and
    # gradients need no pass of their own. Not so on MPS, where they are ignored, and in the first step, which
    # makes the state: torch's SGD leaves that uninitialised.
    if optimizer.state and not bad.is_mps and all(group.get("fused") for group in optimizer.param_groups):
        optimizer.found_inf, optimizer.grad_scale = bad.float(), scale
        optimizer.step()
    elif not bad:
        if grad_clip:
            gradients = (parameter.grad for parameter in parameters_of(optimizer))
            torch._foreach_div_([local_part(each) for each in gradients if each is not None], scale)
        optimizer.step()


def limit_bad_steps(bad_steps, step, config):
    """Raise UserError where too many steps in a row, up to `step`, were skipped."""
    if bad_steps >= config.max_bad_steps:
        raise UserError(
            f"{bad_steps} steps in a row up to step {step} had a gradient that is not finite: try "
            f"--dtype=float32 or a --learning_rate below {config.learning_rate}; ckpt.pt stays"
        )


# The saved state


def load_optimizer(optimizer, saved):
    """
    Fill the optimizer's state from a checkpoint's contents; its settings (betas, ...) stay the run's own.
    Where parameters are sharded, each process takes its own part.

    Raises KeyError, ValueError, TypeError, AttributeError or UserError where the state does not fit.
    """
    if "folder" in saved:
        return load_sharded(optimizer, saved["folder"])
    values = saved["optimizer"]["state"]
    if not isinstance(values, dict):
        raise ValueError("its optimizer has no state of parameters")
    if not values:  # saved before the first update
        return
    make_state(optimizer)
    states = numbered_states(optimizer)
    if other := sorted(map(str, values.keys() ^ states.keys())):
        raise ValueError(f"its optimizer is of other parameters: parameter {other[0]} is not in both")
    for number, state in states.items():
        if state.keys() != values[number].keys():
            raise ValueError(
                f"the optimizer keeps {', '.join(state)} of a parameter, but the checkpoint has "
                f"{', '.join(map(str, values[number]))} of parameter {number}"
            )
        for name, value in values[number].items():
            if isinstance(state[name], torch.Tensor):
                fill(state[name], value, f"{name} of parameter {number}")
            else:
                state[name] = value
    require_steps(states)


def load_sharded(optimizer, folder):
    """The same from a sharded checkpoint, of which each process reads what it needs."""
    from kqv.formats import sharded  # slow import: only for a sharded checkpoint

    if sharded.has_part(folder, "optimizer"):
        make_state(optimizer)
        states = numbered_states(optimizer)
        sharded.load_part(folder, "optimizer", {str(number): state for number, state in states.items()})
        require_steps(states)


def parameters_of(optimizer):
    """The optimizer's parameters, in the order in which a checkpoint numbers them."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def numbered_states(optimizer):
    """{number of a parameter, as in a checkpoint: {name: tensor}}"""
    return {number: optimizer.state[each] for number, each in enumerate(parameters_of(optimizer))}


def require_steps(states):
    """Raise ValueError where a parameter's count of updates is not one: AdamW divides by 1 - beta^count."""
    for number, state in states.items():
        count = float(state.get("step", 0))
        if not (count >= 0 and count.is_integer()):
            raise ValueError(f"step of parameter {number} is {count}, not a whole number of updates")


def make_state(optimizer):
    """
    Let the optimizer make the state that it keeps of each parameter, by a step which changes no weight: of
    gradient 0 and learning rate 0.
    """
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for parameter in parameters_of(optimizer):
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


@torch.no_grad()
def fill(target, value, name):
    """
    Copy a whole tensor into `target`, which may be this process's part of one that is sharded. Instead of a
    count, a tensor of no dimensions, it may be a plain number or of another type of numbers.
    """
    if target.dim() == 0 and type(value) in (int, float):
        value = torch.tensor(float(value))
    value = dense(value)
    if value.shape != target.shape:  # fused kernels trust these shapes
        raise ValueError(f"{name} has the shape {tuple(value.shape)}, not {tuple(target.shape)}")
    if value.dtype != target.dtype and target.dim():
        raise ValueError(f"{name} is of {value.dtype}, not {target.dtype}")
    target.copy_(shard_like(target, value.to(target.dtype)))
