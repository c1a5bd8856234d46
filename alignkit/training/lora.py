"""Low-rank adapters instead of all weights (arXiv 2106.09685), by peft as diffusers carries it."""

import math
import re
from typing import Any

import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

from alignkit.config import LoraSection
from alignkit.errors import ConfigError

ADAPTER = "default"


def check_targets(transformer: nn.Module, section: LoraSection) -> None:
    """Raises ConfigError for one of `section.targets` that no layer is called: peft asks that any of them matches."""
    kinds = nn.Linear | nn.Embedding | nn.Conv3d
    layers = [name for name, module in transformer.named_modules() if isinstance(module, kinds)]
    for target in section.targets:
        if not any(name == target or name.endswith(f".{target}") for name in layers):
            known = sorted({re.sub(r".*?(\w+(\.\d+)?)$", r"\1", name) for name in layers if ".attn" in name})
            raise ConfigError(
                f"train.lora.targets: no layer that can have adapters is called {target!r}; of attention there are "
                f"{', '.join(known)}"
            )


def add_lora(transformer: Any, section: LoraSection, seed: int) -> dict[str, Tensor]:
    """Freeze `transformer` and put adapters on the linear layers that `section.targets` name.

    B starts at zero, so the network's output is the base's, bit for bit; A is drawn from `seed`, the same on every
    process, as peft draws it (arXiv 2106.09685: Kaiming's uniform). Returns the adapters' initial values by name, fp32
    on CPU: in the network they are rounded to its dtype. Raises ConfigError for a target that no
    layer is called.
    """
    check_targets(transformer, section)
    transformer.requires_grad_(False)
    settings = LoraConfig(r=section.rank, lora_alpha=section.alpha, target_modules=list(section.targets))
    try:
        with torch.random.fork_rng(devices=[]):
            transformer.add_adapter(settings, adapter_name=ADAPTER)
    except ValueError as error:
        raise ConfigError(f"train.lora.targets: {list(section.targets)}: {error}") from None
    values, generator = {}, torch.Generator().manual_seed(seed)
    for name, parameter in transformer.named_parameters():
        if parameter.requires_grad:
            values[name] = torch.zeros(parameter.shape, device="cpu")
            if ".lora_A." in name:
                nn.init.kaiming_uniform_(values[name], a=math.sqrt(5), generator=generator)
            with torch.no_grad():
                parameter.copy_(values[name])
    return values


def peft_weights(
    transformer: nn.Module, weights: dict[str, Tensor], section: LoraSection
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Trained weights under the names that files carry, and the adapter's settings as a plain dict."""
    settings = LoraConfig(r=section.rank, lora_alpha=section.alpha, target_modules=list(section.targets))
    return get_peft_model_state_dict(transformer, state_dict=weights, adapter_name=ADAPTER), settings.to_dict()
