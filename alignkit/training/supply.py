"""Pairs that are made while training, from the policy as it is."""

from typing import Any, Protocol

from alignkit.errors import AlignkitError
from alignkit.training.run import Run


class Waiting(AlignkitError):
    """What training needs next is not there yet, and others have to make it: it stops, and goes on where it was."""


class Supply(Protocol):
    """terms: what a run and the one that resumes it must share, in place of the terms of finished pairs."""

    @property
    def terms(self) -> dict[str, Any]: ...

    def check_made(self) -> None:
        """Raises DataError for pairs that were made under other terms. The first process calls this, before anything is
        written."""

    def refresh(self, run: Run, number: int) -> dict[str, float]:
        """Put the pairs of step `number` into `run.store`, and into `run.since` since when; returns numbers for the
        step's metrics. Every process calls this before every step, with the weights that the step starts from.

        What it makes must depend on nothing but the weights and the terms: a run that is resumed calls it again.
        Raises Waiting, on every process.
        """
