"""`localdpo`: preferences between real videos and their own regenerated regions (arXiv 2601.04068)."""

from alignkit.config import Config


def localdpo(config: Config) -> dict:
    """The objective around it, or `local_dpo` where that one compares nothing."""
    return {"objective": {"name": "local_dpo"}} if config.objective.name == "sft" else {}
