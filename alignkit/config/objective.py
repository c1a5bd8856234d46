"""The objectives: which keys each reads, and the value that a key has there."""

import math
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from alignkit.config.sections import Fraction, NonNegative, Number, Section, plain_number

_PREFERENCE = {"beta": 5000.0, "beta_min": 50.0, "beta_max": 5000.0, "loser_safeguard": None, "weight_sft": 0.0}
_SMOOTHED = _PREFERENCE | {"label_smoothing": 0.0}

OBJECTIVES: dict[str, dict[str, Any]] = {
    "local_dpo": _PREFERENCE
    | {"weight_sft": 0.1, "weight_region": 1.0, "weight_global": 1.0, "weight_region_sft": 0.0}
    | {"strength_range": (0.75, 0.90)},
    "dpo": _SMOOTHED,
    "robust_dpo": _SMOOTHED,
    "poly_dpo": _PREFERENCE | {"poly_alpha": 1.0},
    "winner_guarded": _PREFERENCE | {"guard_weight": 1.0, "guard_exponent": 2.0},
    "ipo": _PREFERENCE,
    "hinge": _PREFERENCE,
    "region_dpo": _SMOOTHED,
    "sft": {},
}
"""Every objective: the keys of `objective` that it reads, each with the value it has there unless it is set. What it
computes is the function of its name in `alignkit.objectives.heads`."""


def _beta(value: Any) -> float | str:
    try:
        beta = value if value == "auto" else float(plain_number(value))
    except (TypeError, ValueError):
        beta = math.nan
    if beta != "auto" and not 0 < beta < math.inf:
        raise ValueError("should be a number greater than 0, or auto")
    return beta


class ObjectiveSection(Section):
    """The loss; see docs/losses.md for the objectives, what each key does and how betas convert.

    OBJECTIVES says which objective reads which key, and the default that the key has there.
    """

    name: Literal[*OBJECTIVES] = Field(  # type: ignore[valid-type]
        "local_dpo", description="which loss; the table below has the keys that each reads"
    )
    beta: Annotated[float | Literal["auto"], BeforeValidator(_beta)] = Field(
        5000.0, description="above 0: gaps that differ by 2/β make one logit; auto: from the gaps so far"
    )
    beta_min: Annotated[Number, Field(gt=0)] = Field(50.0, description="with beta: auto, the lowest it may get")
    beta_max: Annotated[Number, Field(gt=0)] = Field(5000.0, description="the highest, and what it starts from")
    label_smoothing: Annotated[Number, Field(ge=0.0, lt=0.5)] = Field(0.0, description="ε, the share of swapped labels")
    loser_safeguard: Fraction | None = Field(
        None, description="μ: holds the loser's gradient back where it would raise the winner's error; null: off"
    )
    poly_alpha: Annotated[Number, Field(ge=-1)] = Field(1.0, description="α of Poly-DPO; 0 is plain dpo")
    guard_weight: NonNegative = Field(1.0, description="of the winner's error in the guard, times a power of a")
    guard_exponent: NonNegative = Field(2.0, description="that power; 0: the same guard at every noise level")
    strength_range: tuple[Fraction, Fraction] = Field(
        (0.75, 0.90),
        description="shares of redone steps [low, high] that become a factor of 1 to 2 on the region's logit",
    )
    weight_region: NonNegative = Field(1.0, description="of the term inside the mask")
    weight_global: NonNegative = Field(1.0, description="of the term over the whole video")
    weight_sft: NonNegative = Field(0.0, description="of the winner's own error; 0.1 for local_dpo, else 0")
    weight_region_sft: NonNegative = Field(
        0.0, description="of the winner's own error inside the mask, the published code's fourth term"
    )

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_objective(cls, given: Any) -> Any:
        name = given.get("name", "local_dpo") if isinstance(given, dict) else None
        return OBJECTIVES[name] | given if isinstance(name, str) and name in OBJECTIVES else given

    @model_validator(mode="after")
    def _keys_are_read(self) -> "ObjectiveSection":
        """Defaults pass, even written out and of another objective: a dumped configuration holds every key."""
        for key, field in type(self).model_fields.items():
            defaults = [field.default, *(keys[key] for keys in OBJECTIVES.values() if key in keys)]
            if key != "name" and key not in OBJECTIVES[self.name] and getattr(self, key) not in defaults:
                readers = ", ".join(name for name, keys in OBJECTIVES.items() if key in keys)
                raise ValueError(f"{key} is not read by the objective {self.name!r}, only by {readers}; leave it out")
        return self

    @model_validator(mode="after")
    def _beta_has_a_range(self) -> "ObjectiveSection":
        if self.beta_min > self.beta_max:
            raise ValueError(f"beta_min is {self.beta_min:g}, above beta_max, {self.beta_max:g}")
        for key in ("beta_min", "beta_max"):
            if self.beta != "auto" and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key} is read with beta: auto alone; leave it out")
        return self

    @model_validator(mode="after")
    def _strengths_do_not_fall(self) -> "ObjectiveSection":
        low, high = self.strength_range
        if low > high:
            raise ValueError(f"strength_range must not fall, got [{low:g}, {high:g}]")
        return self

    @model_validator(mode="after")
    def _something_to_train_on(self) -> "ObjectiveSection":
        names = "weight_region", "weight_global", "weight_sft", "weight_region_sft"
        if self.name == "local_dpo" and not any(getattr(self, name) for name in names):
            raise ValueError(f"{', '.join(names)} are all 0: there is nothing to train")
        return self

    @property
    def largest_beta(self) -> float:
        """β, or with `beta: auto` the highest that it may get."""
        return self.beta_max if self.beta == "auto" else self.beta
