"""How a step's pairs are divided among processes."""

from alignkit.config.whole import Config
from alignkit.errors import ConfigError
from alignkit.launch import groups_of

KEY = "train.context_parallel"


def data_ranks(config: Config, world_size: int) -> int:
    """Groups of processes that train on different pairs. Raises ConfigError as `groups_of`."""
    return groups_of(KEY, config.train.context_parallel, world_size)


def accumulation_steps(config: Config, world_size: int) -> int:
    """Forwards per step and process. Raises ConfigError when batch sizes or processes do not divide."""
    train = config.train
    ranks = data_ranks(config, world_size)
    together = train.micro_batch_size * ranks
    if train.global_batch_size % together:
        groups = "processes" if ranks == world_size else f"groups of {train.context_parallel} processes"
        raise ConfigError(
            f"train.global_batch_size: {train.global_batch_size} is not a multiple of micro_batch_size "
            f"({train.micro_batch_size}) times {ranks} {groups}; set it to a multiple of {together}, or "
            "train.micro_batch_size lower"
        )
    return train.global_batch_size // together
