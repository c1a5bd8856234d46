"""`noise.source: shared`: one fresh noise a pair and epoch, the same for winner and loser (arXiv 2311.12908)."""

from torch import Tensor

from alignkit.config import Config
from alignkit.objectives.laws import Law
from alignkit.objectives.states.noised import Noised, noise_alike
from alignkit.stores.pairs import PairBatch
from alignkit_kernels import NoiseKey, Stream


def shared(config: Config, law: Law, batch: PairBatch, epochs: Tensor) -> Noised:
    key = NoiseKey(config.train.seed, batch.ids, epochs, Stream.TRAINING)
    return noise_alike(batch, law.draw(batch.ids, epochs), key)
