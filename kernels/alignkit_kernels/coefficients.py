"""Rows (a, s, c, d) of the two parameterisations that video models have: x_t = a x0 + s noise, y = c noise + d x0."""

import torch
from torch import Tensor

from .checks import InputError, describe


def flow_coefficients(sigma: Tensor) -> Tensor:
    """Flow matching (Wan2.1): rows (1 - sigma, sigma, 1, -1), [B, 4] in sigma's dtype, from noise levels [B] in [0, 1].

    Raises InputError for anything but a float32 or float64 tensor [B].
    """
    _check("sigma", sigma)
    ones = torch.ones_like(sigma)
    return torch.stack((1 - sigma, sigma, ones, -ones), dim=1)


def v_coefficients(alphas_cumprod: Tensor) -> Tensor:
    """v-prediction (CogVideoX, arXiv:2202.00512): rows (sqrt(ab), sqrt(1 - ab), sqrt(ab), -sqrt(1 - ab)), [B, 4] in the
    dtype of `alphas_cumprod`, its values [B] in [0, 1] at each sample's timestep.

    Raises InputError for anything but a float32 or float64 tensor [B].
    """
    _check("alphas_cumprod", alphas_cumprod)
    a, s = alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()
    return torch.stack((a, s, a, -s), dim=1)


def _check(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor) or x.dtype not in (torch.float32, torch.float64) or x.dim() != 1:
        raise InputError(f"{name} must be a float32 or float64 tensor [B], got {describe(x)}")
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        outside = [value for value in x.tolist() if not 0 <= value <= 1]
        if outside:
            raise InputError(f"{name} holds {outside[0]}, expected 0 to 1")
