"""`offline`: preferences between pairs that are ranked already: a store, or videos that `data` of its entry names."""

from alignkit.config import Config


def offline(config: Config) -> dict:
    """The objective around it, or `dpo` where that one compares nothing."""
    return {"objective": {"name": "dpo"}} if config.objective.name == "sft" else {}
