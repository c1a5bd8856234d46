"""Rankers: which of two videos of one prompt is better. People, a vision-language model, a function, measures.

Each is a class with `compare` (`protocol.py`); a new one is its file and a line in `open_ranker`.
"""

from pathlib import Path

from alignkit.config import RankerSection
from alignkit.errors import ConfigError
from alignkit.evaluation.scorers import INSTALL, SCORERS, installed, scores_to_rank_by
from alignkit.rankers.endpoint import ByEndpoint
from alignkit.rankers.functions import ByFunction, find_function
from alignkit.rankers.measures import MEASURES, ByScore
from alignkit.rankers.protocol import Ranker

PEOPLE = "people"


def open_ranker(section: RankerSection, work: Path) -> Ranker:
    """The ranker that the configuration names, ready to be asked; people are asked through a folder instead, by
    `alignkit.rankers.people`. work: a folder for files of a scorer's own.

    Raises ConfigError for one that is not known, not installed or not set.
    """
    by = section.by
    if by is None:
        raise ConfigError(f"ranker.by: not set; one of {', '.join(names())}, or package.module:function")
    if section.endpoint is not None:
        return ByEndpoint(section.endpoint)
    if by in MEASURES:
        return ByScore(by, MEASURES[by])
    if by in SCORERS:
        if by not in installed():
            raise ConfigError(f"ranker.by: {by} is not installed ({INSTALL[by]}); install it or choose another ranker")
        return ByScore(by, lambda prompts, files: scores_to_rank_by(by, files, prompts, work))
    return ByFunction(by, find_function(by))


def names() -> tuple[str, ...]:
    return (PEOPLE, "endpoint", *MEASURES, *SCORERS)
