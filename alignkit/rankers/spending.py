"""What the questions to an endpoint have cost, and that they stay within a budget."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from alignkit.config.endpoint import EndpointSection
from alignkit.errors import DataError

SECONDS_BETWEEN_LOOKS = 0.02


class Spending:
    """Tokens and money of one run. A question that got lost on its way back may have been charged for, and is taken
    for as dear as the dearest."""

    def __init__(self, section: EndpointSection):
        self._budget, self._prices = section.budget, (section.price_in, section.price_out)
        self._known = self._unknown = self._open = 0  # questions of known tokens, the others, comparisons
        self._tokens_in = self._tokens_out = 0
        self._dearest = 0.0

    @property
    def line(self) -> str:
        """Questions, tokens and cost so far."""
        text = f"{self._questions()}, {self._tokens_in} tokens in, {self._tokens_out} out"
        if None not in self._prices:
            text += f", cost {self._price(self._tokens_in, self._tokens_out):.4g}"
        if self._unknown:
            text += f"; without {self._unknown} of them, whose tokens the endpoint did not say"
        return text

    @asynccontextmanager
    async def comparison(self) -> AsyncIterator[None]:
        """Entered once the budget lasts for two more questions.

        Raises DataError where it does not, when the comparisons that were begun are finished. The first goes alone: its
        answers show what a question costs.
        """
        while self._open and self._budget is not None and (not self._known or self._exceeds(2 * (self._open + 1))):
            await asyncio.sleep(SECONDS_BETWEEN_LOOKS)
        self.check(2)
        self._open += 1
        try:
            yield
        finally:
            self._open -= 1

    def check(self, questions: int = 1) -> None:
        """Raises DataError where the budget does not last for so many more."""
        if self._exceeds(questions):
            raise DataError(
                f"ranker.endpoint.budget of {self._budget:g} is used up after {self.line}; raise it and run the same "
                "again, what was answered is kept"
            )

    def sent(self) -> None:
        """A question is on its way; followed by `answered` or `not_charged`, or it stays one of unknown cost."""
        self._unknown += 1

    def not_charged(self) -> None:
        self._unknown -= 1

    def answered(self, usage: object) -> None:
        """Takes `usage` of an answer. Raises DataError where it says nothing and there is a budget to keep."""
        usage = usage if isinstance(usage, dict) else {}
        counts: list[Any] = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
        if not all(type(count) is int and count >= 0 for count in counts):
            if self._budget is not None:
                raise DataError(
                    "ranker.endpoint.budget: cannot be kept, the endpoint does not say how many tokens it took; set it "
                    "to null"
                )
            return
        self._unknown -= 1
        self._known += 1
        self._tokens_in += counts[0]
        self._tokens_out += counts[1]
        self._dearest = max(self._dearest, self._price(*counts))

    def _exceeds(self, more: int) -> bool:
        if self._budget is None:
            return False
        return self._price(self._tokens_in, self._tokens_out) + (self._unknown + more) * self._dearest > self._budget

    def _price(self, tokens_in: int, tokens_out: int) -> float:
        price_in, price_out = self._prices
        return ((price_in or 0) * tokens_in + (price_out or 0) * tokens_out) / 1e6

    def _questions(self) -> str:
        count = self._known + self._unknown
        return f"{count} question{'s' * (count != 1)}"
