"""The section that says who ranks rollouts."""

from typing import Literal

from pydantic import Field, model_validator

from alignkit.config.endpoint import EndpointSection
from alignkit.config.sections import Fraction, Positive, Section


class RankerSection(Section):
    """Which of two rollouts of a prompt is better; what ranks should not judge afterwards."""

    by: str | None = Field(
        None,
        description="people, endpoint, small_world, motion, flicker, VideoAlign, VBench, HPSv2, or your own function, "
        "package.module:function; null: nobody yet",
    )
    min_margin: Fraction = Field(0.1, description="where |P(a is better) - P(b is better)| is less, neither is")
    keep: Literal["best_worst", "all"] = Field(
        "best_worst", description="of each prompt: the best against the worst, or every pair that is no tie"
    )
    endpoint: EndpointSection | None = Field(
        None, description="the vision-language model, with ranker.by: endpoint; else null"
    )
    votes: Positive = Field(1, description="people: answers wanted for each pair of videos")

    @model_validator(mode="after")
    def _endpoint_where_it_is_asked(self) -> "RankerSection":
        if (self.by == "endpoint") != (self.endpoint is not None):
            raise ValueError("endpoint: goes with ranker.by: endpoint, and needs url and model")
        return self
