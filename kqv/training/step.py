"""One optimizer step."""

import math

import torch

from kqv.training.optimizer import norm_of_gradients, step_unless


def train_step(model, state, batches, config, world, autocast, share=None):
    """
    One optimizer step over this process's micro-batches. `model` gives the loss of state.model, and its
    backward pass averages gradients over the processes. A step whose gradient is not finite is skipped, and
    so is one without micro-batches, which has nothing to learn. `share` is how many this process has, None:
    as the settings say.

    Returns numbers to log, as tensors on the device: {"loss": the weighted mean of these micro-batches,
    "grad_norm": of all processes' mean gradient, before clipping, "bad_steps": how many were skipped in a row
    for their gradient}.
    """
    share = share or config.gradient_accumulation_steps // world.size
    micro_step, loss_sum = 0, torch.zeros((), device=world.device)
    for micro_step, (batch, weight, seed) in enumerate(batches, start=1):
        if config.dropout:
            torch.manual_seed(seed)  # so dropout, too, is a function of (seed, step, micro-batch)
        with world.reduce_gradients(model, last=micro_step == share):
            with autocast:
                loss = model(*batch) * weight
            state.scaler.scale(loss / share).backward()
        loss_sum += loss.detach()
    if not micro_step:
        nothing = torch.full_like(loss_sum, math.nan)
        return {"loss": nothing, "grad_norm": torch.zeros_like(loss_sum), "bad_steps": state.bad_steps}
    state.scaler.unscale_(state.optimizer)
    grad_norm = norm_of_gradients(state.model.parameters())
    bad = ~torch.isfinite(grad_norm)
    state.bad_steps.add_(1).mul_(bad)  # back to 0 at the first good step
    step_unless(bad, state.optimizer, grad_norm, config.grad_clip)
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=world.frees_gradients(model))
    return {"loss": loss_sum / share, "grad_norm": grad_norm, "bad_steps": state.bad_steps}
