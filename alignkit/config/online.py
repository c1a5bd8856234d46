"""The section of stages that make their pairs while they train."""

from pydantic import Field, model_validator

from alignkit.config.sections import Positive, Section


class OnlineSection(Section):
    """Rounds: rollouts of the policy as it is, ranked, and trained on for some steps."""

    every: Positive = Field(20, description="steps from one round to the next")
    prompts: Positive | None = Field(None, description="prompts of a round, in turn; null: all of them in each")
    staleness: Positive | None = Field(
        None, description="steps after which a round's pairs are dropped; null: when the next round is there"
    )
    queue: Positive | None = Field(None, description="most pairs to draw from, the newest ones; null: no limit")

    @model_validator(mode="after")
    def _pairs_until_the_next_round(self) -> "OnlineSection":
        if self.staleness is not None and self.staleness < self.every:
            raise ValueError(
                f"staleness: {self.staleness} steps end before the next round, after {self.every}; raise it, or lower "
                "every"
            )
        return self
