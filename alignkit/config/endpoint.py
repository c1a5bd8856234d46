"""The section of a vision-language model that ranks, behind an OpenAI-compatible endpoint."""

import re
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import ConfigDict, Field, model_validator

from alignkit.config.sections import Count, NonNegative, Number, Positive, Section

Seconds = Annotated[Number, Field(gt=0.0)]

QUESTION = """Both videos were made for the same prompt: {prompt}
Which of the two is better? Weigh, in this order:
1. whether it shows what the prompt asks for;
2. visual faults: things that are torn, distorted, flicker, or come and go without a reason;
3. motion: that there is the motion that the prompt asks for, natural and steady.
Answer with exactly this JSON and nothing else: {"better": "first"} or {"better": "second"}, or {"better": "tie"} if \
neither is better."""


class EndpointSection(Section):
    """A vision-language model that is asked which of two videos is better, twice, in both orders."""

    # A key or a password in the wrong place must not be shown with the error that refuses it.
    model_config = ConfigDict(hide_input_in_errors=True)

    url: str = Field(description="as far as /v1, for example http://localhost:8000/v1")
    model: str = Field(min_length=1, description="as the endpoint calls it")
    key_env: str | None = Field(
        "OPENAI_API_KEY",
        description="name of the environment variable that holds the key for this url; null: it takes none",
    )
    send: Literal["frames", "video"] = Field(
        "frames", description="video: the whole file, as vLLM takes it; many endpoints take pictures only"
    )
    frames: Annotated[int, Field(ge=2, strict=True)] = Field(
        8, description="of each video, evenly spaced, with the first and last"
    )
    question: str = Field(QUESTION, description="holds {prompt}, and asks for the JSON of the default")
    timeout_s: Seconds = Field(120.0, description="for one answer, from connecting to its last byte")
    retries: Count = Field(5, description="of a question that fails; the waits double, from a second to a minute")
    at_once: Positive = Field(4, description="comparisons in flight; each has one question open at a time")
    budget: Annotated[Number, Field(gt=0.0)] | None = Field(
        None, description="what one ranking, or round of a stage, may spend, in the prices' currency; null: no limit"
    )
    price_in: NonNegative | None = Field(None, description="of a million tokens; null: the cost is not known")
    price_out: NonNegative | None = Field(None, description="of a million tokens; null: the cost is not known")
    temperature: NonNegative | None = Field(0.0, description="null: not sent, for models that refuse it")
    max_tokens: Positive | None = Field(256, description="of an answer; null: not sent, for models that refuse it")

    # All in validators of the section, and none of a field: those name the value that they refuse.
    @model_validator(mode="after")
    def _url_without_secrets(self) -> "EndpointSection":
        if any(mark in self.url for mark in "@?#"):
            raise ValueError(
                "url: holds '@', '?' or '#'; give it without user, password and query, and the key in the environment "
                "variable that key_env names"
            )
        try:
            usable = re.fullmatch(r"https?://[^\s/]+(/\S*)?", self.url) and urlsplit(self.url).port != 0
        except ValueError:  # its text repeats a part of the url
            usable = False
        if not usable:
            raise ValueError("url: is no http:// or https:// address, for example http://localhost:8000/v1")
        return self

    @model_validator(mode="after")
    def _key_by_name(self) -> "EndpointSection":
        # Lower-case letters are refused because keys have them, and a key here would be stored with the run.
        if self.key_env is not None and not re.fullmatch(r"[A-Z_][A-Z0-9_]*", self.key_env):
            raise ValueError(
                "key_env: give the name of an environment variable (capitals, digits and _), never the key itself"
            )
        return self

    @model_validator(mode="after")
    def _question_asks(self) -> "EndpointSection":
        if "{prompt}" not in self.question or '"better"' not in self.question:
            raise ValueError('question: must hold {prompt} and ask for {"better": "first"}, or "second", or "tie"')
        return self

    @model_validator(mode="after")
    def _budget_has_prices(self) -> "EndpointSection":
        if self.budget is not None and (self.price_in is None or self.price_out is None):
            raise ValueError("budget: needs price_in and price_out, of a million tokens in the same currency")
        return self
