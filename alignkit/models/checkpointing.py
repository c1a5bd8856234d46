"""Activation checkpointing of a transformer's layers: all of a layer is computed again, or all but its attention."""

from typing import Any

import torch
from torch import nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from alignkit.errors import ConfigError
from alignkit.models.attention import BACKENDS, try_backend

FORWARD_OPS = {
    "flash_3": {"_diffusers_flash_attn_3::_flash_attn_forward"},
    "flash": {"flash_attn::_flash_attn_forward"},
    "cudnn": {"aten::_scaled_dot_product_cudnn_attention"},
    "native_flash": {
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
    },
    "xformers": {
        "xformers_flash::flash_fwd",
        "xformers_flash3::flash_fwd",
        "xformers::efficient_attention_forward_cutlass",
        "aten::_efficient_attention_forward",
    },
    "native": {
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_efficient_attention",
        "aten::_scaled_dot_product_cudnn_attention",
    },
}
"""What computes attention, by backend (`alignkit.models.attention`), as torch's dispatcher names it; which of a
backend's ops that is depends on device, dtype and versions."""


def set_checkpointing(transformer: Any, mode: str) -> None:
    """Make `transformer` keep, for the backward pass, the inputs of its layers alone ("full"), or their attention's
    outputs too ("selective", with torch's selective checkpointing), and compute the rest again; "none": everything.

    Of a selective layer whose backend `check_selective` has not accepted, attention may be computed again.
    """
    if mode == "full":
        transformer.enable_gradient_checkpointing()
    elif mode == "selective":
        transformer.enable_gradient_checkpointing(_attention_kept)


def check_selective(backend: str, head_dim: int, device: torch.device, dtype: torch.dtype) -> None:
    """Raises ConfigError unless what `backend`, a name in FORWARD_OPS that runs there, computes attention by is an op
    that torch can see, and so keep the outputs of."""
    with _Seen() as seen:
        try_backend(BACKENDS[backend][0], head_dim, device, dtype)
    if not seen.ops & FORWARD_OPS[backend]:
        raise ConfigError(
            f"train.checkpointing: 'selective' cannot keep what attention {backend!r} computes on {device.type} in "
            f"{dtype}: it calls none of {', '.join(sorted(FORWARD_OPS[backend]))}; use 'full', or another "
            "model.attention"
        )


def _attention_kept(layer: nn.Module, *inputs: Any) -> Any:
    return checkpoint(layer.__call__, *inputs, use_reentrant=False, context_fn=_contexts)


def _contexts() -> tuple[TorchDispatchMode, TorchDispatchMode]:
    kept = set().union(*FORWARD_OPS.values())

    def policy(_: Any, op: OpOverload, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if op.name() in kept else CheckpointPolicy.PREFER_RECOMPUTE

    keep, give_back = create_selective_checkpoint_contexts(policy)
    return _Shown(kept, keep), _Shown(kept, give_back)


class _Shown(TorchDispatchMode):
    """Shows `mode` the ops of these names alone. Torch's own modes count every op and fail where a layer is computed
    again by others: under ZeRO-3 its parameters are gathered by what is not the same both times."""

    def __init__(self, names: set[str], mode: TorchDispatchMode):
        super().__init__()  # type: ignore[no-untyped-call]
        self.names, self.mode = names, mode

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.name() in self.names:
            return self.mode.__torch_dispatch__(func, types, args, kwargs)
        return func(*args, **(kwargs or {}))


class _Seen(TorchDispatchMode):
    """Notes the names of the ops that are called."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ops: set[str] = set()

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.ops.add(func.name())
        return func(*args, **(kwargs or {}))
