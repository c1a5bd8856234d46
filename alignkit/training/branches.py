"""`train.branches: apart`: winners and losers through the policy one after the other, with half the activations.

The loss is made of predictions that have no graph, and its gradient with respect to each side's is where the backward
pass of that side's own forward begins: the chain rule, so all of a loss works, whatever is in it.
"""

from typing import Any

import torch
from torch import Tensor

from alignkit.models import VideoModel
from alignkit.objectives.states import States, predictions

Sides = tuple[Tensor, Tensor]


@torch.no_grad()
def predict_sides(model: VideoModel, policy: Any, states: States) -> Sides:
    """The policy's predictions for (winners, losers), [B, ...] each, by one forward without a graph: the loss of these
    is what `backward_apart` takes. The reference's come of a forward of the same shape, so logits of 0 are exactly 0.
    """
    winners, losers = predictions(model, policy, states).chunk(2)
    return winners.detach().requires_grad_(), losers.detach().requires_grad_()


def backward_apart(model: VideoModel, policy: Any, states: States, sides: Sides, loss: Tensor) -> None:
    """Add to the policy's gradient what `policy.backward(loss)` would if `sides` had a graph: a forward and a backward
    pass for the winners, then for the losers.

    For DeepSpeed it is one micro-batch: whether that is a step's last, as the engine is told, is so for the losers.
    """
    last = policy.is_gradient_accumulation_boundary()
    # divided before the slopes are rounded to the predictions' dtype, as in a backward pass of the whole
    slopes = torch.autograd.grad(loss / policy.gradient_accumulation_steps(), sides)
    for number, slope in enumerate(slopes):
        policy.set_gradient_accumulation_boundary(last and number == 1)
        prediction = predictions(model, policy, states, slice(number * len(slope), (number + 1) * len(slope)))
        policy.backward((prediction * slope).sum(), scale_wrt_gas=False)
