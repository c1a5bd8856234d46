"""What the tiny model of each family is built of; one module a family, all with the names of `Recipe`."""

from collections.abc import Callable
from types import ModuleType
from typing import Protocol

import torch
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin
from torch import Tensor
from transformers import ByT5Tokenizer, PreTrainedModel

from alignkit.models import VideoModel

FAMILIES = ("wan", "cogvideox")


class Recipe(Protocol):
    """The choices that differ between families; the training of every part is the same code for all.

    TITLE: the family's name in words.
    PIPELINE: diffusers' class, which loads what `pipeline` builds.
    VAE_BATCHES: (clips, frames, pixels a side) of a VAE step, in turn: about the same work each.
    ADAPTER: the family's class in `alignkit.models`.
    TEXT_LENGTHS, TEXT_LENGTH_SHARES: to how many tokens the text is padded for the transformer, and how often.
    ENCODED_LENGTHS, ENCODED_LENGTH_SHARES: the same for the training of the text encoder.
    PATH_POINTS: the law of the u in [0, 1] that the transformer is trained at, "logit_normal" or "root_uniform"
        (the root of a uniform number: density 2·u).
    HELD_OUT_POINTS: the u at which its error on held-out clips is measured.
    """

    TITLE: str
    PIPELINE: type[DiffusionPipeline]
    VAE_BATCHES: tuple[tuple[int, int, int], ...]
    ADAPTER: Callable[[str, int, SchedulerMixin], VideoModel]
    TEXT_LENGTHS: tuple[int, ...]
    TEXT_LENGTH_SHARES: tuple[float, ...]
    ENCODED_LENGTHS: tuple[int, ...]
    ENCODED_LENGTH_SHARES: tuple[float, ...]
    PATH_POINTS: str
    HELD_OUT_POINTS: tuple[float, ...]

    def new_vae(self) -> ModelMixin: ...

    def decode_unclamped(self, vae: ModelMixin, latents: Tensor) -> Tensor:
        """What `vae.decode` gives, with a gradient for pixels beyond the range too."""

    def store_statistics(self, vae: ModelMixin, latents: Tensor, variance: Tensor, contrast: Tensor) -> None:
        """Give the VAE the scale that the pipeline reads off its config, from latents [N, C, F, h, w] of some clips.

        `variance`: the posterior's own by channel, [C]. `contrast`: `shape_contrast`, [C, C]. The VAE's latents may
        change by this; the videos that it makes of them may not.
        """

    def normalise(self, vae: ModelMixin, latents: Tensor) -> Tensor:
        """The VAE's latents as the transformer sees them; [N, C, F, h, w] stays."""

    def denormalise(self, vae: ModelMixin, latents: Tensor) -> Tensor:
        """The inverse of `normalise`."""

    def new_text_encoder(self) -> PreTrainedModel: ...

    def encode_prompts(
        self, tokenizer: ByT5Tokenizer, encoder: PreTrainedModel, prompts: list[str], length: int
    ) -> Tensor:
        """Text as the pipeline encodes it: float [B, length, D]."""

    def new_transformer(self) -> ModelMixin: ...

    def new_scheduler(self) -> SchedulerMixin: ...

    def to_network(self, latents: Tensor) -> Tensor:
        """Latents [N, C, F, h, w] in the transformer's layout."""


def recipe_of(family: str) -> ModuleType:
    """The recipe module of `family`, which holds the names of `Recipe`."""
    from alignkit.tiny.recipes import cogvideox, wan

    return {"wan": wan, "cogvideox": cogvideox}[family]


def per_channel(values: list[float]) -> Tensor:
    """Numbers by latent channel, ready to scale latents [N, C, F, h, w]."""
    return torch.tensor(values).view(1, -1, 1, 1, 1)
