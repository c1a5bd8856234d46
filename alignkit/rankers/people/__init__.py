"""People as the ranker: a local page asks them which of two videos is better, and their votes are kept in the folder.

A folder holds comparisons.jsonl, the videos that it names, and votes.sqlite, which the page writes.
"""

from alignkit.rankers.people.comparisons import Pair, read_comparisons, write_comparisons
from alignkit.rankers.people.results import answers, summary, waiting

__all__ = ["Pair", "answers", "read_comparisons", "summary", "waiting", "write_comparisons"]
