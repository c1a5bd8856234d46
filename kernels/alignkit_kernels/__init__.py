"""Fused preference losses and keyed noise for diffusion transformers: tensors in, tensors out.

Works with torch alone on any device; with triton, CUDA tensors take fused kernels. See `docs/kernels.md`.
"""

from . import losses
from .checks import InputError
from .coefficients import flow_coefficients, v_coefficients
from .dispatch import count_launches
from .errors import RegionErrors, region_errors
from .local_dpo import local_dpo_loss
from .losses import LocalDPOLoss
from .noise import add_keyed_noise, keyed_rand, keyed_randn
from .pairs import PairRegionErrors, pair_region_errors
from .preference import PreferenceLoss, preference_loss
from .sources import NoiseKey, NoiseSource, PathState
from .streams import Stream

__all__ = [
    "InputError",
    "LocalDPOLoss",
    "NoiseKey",
    "NoiseSource",
    "PairRegionErrors",
    "PathState",
    "PreferenceLoss",
    "RegionErrors",
    "Stream",
    "add_keyed_noise",
    "count_launches",
    "flow_coefficients",
    "keyed_rand",
    "keyed_randn",
    "local_dpo_loss",
    "losses",
    "pair_region_errors",
    "preference_loss",
    "region_errors",
    "v_coefficients",
]
