"""Terms that are added to a preference objective's loss, each weighed by a key of `objective`.

An objective has the terms whose key it reads (`alignkit.config.OBJECTIVES`). A new one is its function and a line in
TERMS.
"""

from collections.abc import Callable

from torch import Tensor

from alignkit.objectives.scored import Scored
from alignkit_kernels import losses


def sft(pairs: Scored) -> Tensor:
    """The winner's own mean error, which keeps the model on the winners."""
    return losses.sft(pairs.means.error_w)


def region_sft(pairs: Scored) -> Tensor:
    """The same inside the mask, times LocalDPO's 1 + η: the published code's fourth term."""
    range_ = pairs.objective.strength_range
    factor = 1 + losses.strength_eta(pairs.batch.strength, range_, like=pairs.means.error_w)
    return factor * losses.sft(pairs.means.region_error_w)


TERMS: dict[str, Callable[[Scored], Tensor]] = {"weight_sft": sft, "weight_region_sft": region_sft}
"""By the key that weighs it: from scored pairs to fp64 [B]."""

FUSED = dict(TERMS)
"""Those that the fused loss computes itself."""
