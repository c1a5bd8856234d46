"""Which attention kernel a transformer runs on: diffusers' dispatcher, with a name that holds or an error."""

from typing import Any

import torch
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    dispatch_attention_fn,
)

from alignkit.errors import ConfigError

# our names, diffusers' names, and what to install; best first
BACKENDS = {
    "flash_3": ("_flash_3", "build FlashAttention 3 from its source (hopper/); it needs an H100 or H200"),
    "flash": ("flash", "pip install 'alignkit[flash]'; it needs an NVIDIA GPU and bf16"),
    "cudnn": ("_native_cudnn", "it needs an NVIDIA GPU, bf16, and a torch built with cuDNN"),
    "native_flash": ("_native_flash", "on a GPU it needs bf16"),
    "xformers": ("xformers", "pip install 'alignkit[xformers]'; it needs an NVIDIA GPU"),
    "native": ("native", "it runs everywhere"),
}


def set_attention(
    transformer: Any, wanted: str, device: torch.device, dtype: torch.dtype, *, shared: str | None = None
) -> str:
    """Make `transformer` use the backend `wanted` on `device` in `dtype`; returns the name that was taken.

    "auto" takes the first of BACKENDS that runs there, forward and backward, and `native` on a CPU. Raises
    ConfigError for a named one that does not run, with its reason and what to install: never a silent fallback.
    shared: the key that has a sequence's tokens shared among processes, which not every backend can; None: no key.
    """
    names = [wanted]
    if wanted == "auto":
        names = ["native"] if device.type == "cpu" else list(BACKENDS)
    if shared:
        able = [name for name in BACKENDS if shares_tokens(name, device)]
        names = [name for name in names if name in able]
        if not names:
            raise ConfigError(
                f"model.attention: {wanted!r} cannot share tokens among processes on {device.type}, which "
                f"{shared} asks for; {', '.join(able)} can"
            )
    for name in names:
        ours, advice = BACKENDS[name]
        try:
            transformer.set_attention_backend(ours)
            try_backend(ours, transformer.config.attention_head_dim, device, dtype)
            return name
        except Exception as error:  # each backend raises its own kinds
            problem = " ".join(str(error).split())[:200]
    transformer.set_attention_backend("native")
    raise ConfigError(f"model.attention: {wanted!r} cannot run on {device.type} in {dtype}: {problem}; {advice}")


def shares_tokens(name: str, device: torch.device) -> bool:
    """Whether diffusers can exchange tokens for heads around a backend."""
    # for this one it then calls what a CPU has not got, where it asks torch for it otherwise
    if name == "native_flash" and device.type == "cpu":
        return False
    return _AttentionBackendRegistry._is_context_parallel_available(AttentionBackendName(BACKENDS[name][0]))


def try_backend(backend: str, head_dim: int, device: torch.device, dtype: torch.dtype) -> None:
    """Attention forward and backward by `backend`, diffusers' name; raises what it raises where it cannot."""
    inputs = torch.arange(3 * 128 * 2 * head_dim, device=device, dtype=torch.float32).sin().to(dtype)
    inputs = inputs.view(3, 1, 128, 2, head_dim).requires_grad_()
    dispatch_attention_fn(*inputs.unbind(), backend=backend).sum().backward()
    if inputs.grad is None or not torch.isfinite(inputs.grad).all():
        raise RuntimeError("its gradient is not finite")
