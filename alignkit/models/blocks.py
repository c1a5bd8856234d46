"""Regional compilation: the repeated block of a transformer, compiled once and used for every layer."""

from torch import nn


def compile_blocks(transformer: nn.Module) -> None:
    """Compile each layer of `transformer` in place by `torch.compile`, which reuses one block's code for all.

    diffusers' `compile_repeated_blocks` needs the model to name its block, and CogVideoX names none; both families
    keep their layers in the one ModuleList there is. Under ZeRO-3 DeepSpeed's hooks break the graph at every
    module, so that little is gained there; ZeRO-2 leaves the block whole.
    """
    (layers,) = (child for child in transformer.children() if isinstance(child, nn.ModuleList))
    for layer in layers:
        layer.compile()
