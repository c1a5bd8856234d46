"""`sft`: supervised fine-tuning on the winners of the pairs."""

from alignkit.config import Config


def sft(config: Config) -> dict:
    return {} if config.objective.name == "sft" else {"objective": {"name": "sft"}}
