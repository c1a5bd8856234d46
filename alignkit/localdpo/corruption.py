"""Regenerates masked regions of a real video with the frozen base model, in latent space, in one inference."""

from collections.abc import Callable

import torch
from torch import Tensor

from alignkit.schedules import Schedule, one_step
from alignkit_kernels import NoiseKey, add_keyed_noise

Predict = Callable[[Tensor, Tensor], Tensor]


@torch.no_grad()
def regenerate(
    clean: Tensor,
    mask: Tensor,
    predict: Predict,
    schedule: Schedule,
    noise: NoiseKey,
    steps: int,
    watch: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """The loser's latents: `clean` with the regions of `mask` redone over the last `steps` of the schedule.

    clean: fp32 [B, ...]; mask: uint8, broadcastable to it (1: regenerate); predict(state, timesteps [B]) is the
    guided network. After every step the region outside the mask is replaced by the clean latent re-noised to
    the new level; at the last step that is the clean latent itself, so the result equals `clean` bit for bit
    there (arXiv 2601.04068, section 3.2; the published code omits the last paste). The solver is first-order:
    a multistep solver carries a state of its own, which would bring back what was pasted over.
    `watch(i, state)` is called with the state that the solver carries into each step i, and with the result.
    """
    if not 1 <= steps <= len(schedule):
        raise ValueError(f"steps must lie between 1 and {len(schedule)}, got {steps}")
    inside = mask.to(clean.device).bool()
    rows = schedule.coefficients

    def known(i: int) -> Tensor:
        if i == len(schedule):
            return clean
        return add_keyed_noise(clean, rows[i].expand(len(clean), 4).to(clean.device), noise)

    first = len(schedule) - steps
    state = known(first)
    for i in range(first, len(schedule)):
        if watch:
            watch(i, state)
        timesteps = schedule.timesteps[i].expand(len(clean)).to(clean.device, torch.float32)
        state = one_step(state, predict(state, timesteps), rows[i], rows[i + 1])
        state = torch.where(inside, state, known(i + 1))
    if watch:
        watch(len(schedule), state)
    return state
