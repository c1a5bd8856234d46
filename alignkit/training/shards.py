"""The part of each trained parameter's fp32 master that this process holds, under every stage of ZeRO."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from alignkit.training.weights import own_part


def trained_parameters(policy: Any) -> Iterator[tuple[str, nn.Parameter]]:
    for name, parameter in policy.module.named_parameters():
        if parameter.requires_grad:
            yield name, parameter


def place(parameter: Any) -> slice:
    """Which elements of a parameter, flat, are this process's: under ZeRO-3 an even part, whose end may lie past the
    parameter's; under ZeRO-1 and 2 what it updates; without ZeRO, which has no masters apart from the weights, an even
    part."""
    rank = torch.distributed.get_rank()
    if hasattr(parameter, "ds_tensor"):
        size = parameter.ds_tensor.numel()
    elif hasattr(parameter, "_hp_mapping"):
        address = parameter._hp_mapping.lp_fragment_address if parameter._hp_mapping else None
        return slice(address.start, address.start + address.numel) if address else slice(0, 0)
    else:
        size = -(-parameter.numel() // torch.distributed.get_world_size())
    return slice(rank * size, (rank + 1) * size)


def part_of(whole: Tensor, parameter: Any) -> Tensor:
    """Of a whole value of a parameter, or of all processes' parts of it one after the other."""
    if hasattr(parameter, "ds_tensor"):
        return own_part(whole.flatten()[: parameter.ds_shape.numel()], parameter)
    return whole.flatten()[place(parameter)]


def own_master(parameter: Any) -> Tensor:
    """This process's part, flat, of the policy's fp32 parameter."""
    from deepspeed.utils import safe_get_local_fp32_param

    if hasattr(parameter, "ds_tensor"):
        return safe_get_local_fp32_param(parameter)
    if getattr(parameter, "_hp_mapping", None):
        return parameter._hp_mapping.hp_fragment
    return parameter.data.flatten()[place(parameter)].float()  # of the network in bf16 it is nothing
