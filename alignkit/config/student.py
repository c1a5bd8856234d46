"""The section of stages that make a few-step student and keep it beside its teacher."""

from pydantic import Field, model_validator

from alignkit.config.sections import Fraction, NonNegative, Positive, Section


class StudentSection(Section):
    """A model that samples in a few steps without guidance, and the many-step teacher that it was distilled from."""

    num_inference_steps: Positive = Field(4, description="the student's; each must be one of the teacher's too")
    teacher: str | None = Field(
        None, description="of drift_correction: a folder or hub id; null: what the chain's distill stage began with"
    )
    teacher_steps: Positive | None = Field(None, description="the teacher's own; null: as in sample")
    ratio: Positive = Field(5, description="steps that compare pairs to each step that distils")
    weight: NonNegative = Field(
        0.0,
        description="λ: above 0 a term, instead of steps that distil, of the distance to the teacher on the "
        "student's own states",
    )
    high_noise_first: Fraction = Field(
        0.5, description="share of the steps, from the first on, that compare pairs at the noisier half of them alone"
    )

    @model_validator(mode="after")
    def _one_way_to_stay_near(self) -> "StudentSection":
        if self.weight and self.ratio != type(self).model_fields["ratio"].default:
            raise ValueError(
                "ratio: is not read with a weight, which stands beside the preference in every step; leave it out"
            )
        return self
