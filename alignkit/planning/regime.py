"""What of a configuration decides memory and work, as a run would resolve it on a GPU."""

from dataclasses import dataclass

import torch

from alignkit.config import Config
from alignkit.config.batches import accumulation_steps
from alignkit.objectives.preference import needs_reference
from alignkit.planning.constants import DEEPSPEED
from alignkit.training.distributed import Process
from alignkit.training.settings import check_deepspeed, deepspeed_config

DTYPES = {"auto": torch.bfloat16, "bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Regime:
    """width: bytes of a weight. gradient: of an accumulated gradient. reference: as a run resolves it, None without
    one. videos: in one forward of a process. checkpointing: one of `counting.MODES`. apart: whether winners and losers
    go through the network in turn, after a forward of both. context: GPUs that share the tokens of a video."""

    gpus: int
    dtype: torch.dtype
    stage: int
    offload_weights: bool
    offload_optimizer: bool
    gradient: int
    reference: str | None
    teacher: bool
    checkpointing: str
    apart: bool
    context: int
    videos: int
    accumulation: int
    buckets: dict[str, float]

    @property
    def width(self) -> int:
        return self.dtype.itemsize

    def shared(self, from_stage: int) -> int:
        """Among how many GPUs what ZeRO shares out from a stage on is divided."""
        return self.gpus if self.stage >= from_stage else 1

    @property
    def kept_videos(self) -> int:
        """Whose activations are there at once."""
        return self.videos // 2 if self.apart else self.videos


def regime(config: Config, gpus: int, *, later: bool = False) -> Regime:
    """later: of a stage that another one hands its weights to.

    Raises ConfigError for batch sizes or GPUs that do not divide, and for what DeepSpeed's settings cannot be.
    """
    dtype, process = DTYPES[config.model.dtype], Process(0, gpus, 0, torch.device("cpu"))
    check_deepspeed(config, process)
    settings = deepspeed_config(config, process)
    zero = settings["zero_optimization"]
    accumulated = settings["data_types"]["grad_accum_dtype"]
    compares = needs_reference(config.objective)
    branches = 2 if config.noise.guided else 1
    return Regime(
        gpus=gpus,
        dtype=dtype,
        stage=zero["stage"],
        offload_weights=zero.get("offload_param", {}).get("device", "none") != "none",
        offload_optimizer=zero.get("offload_optimizer", {}).get("device", "none") != "none",
        gradient=2 if accumulated in ("bf16", "fp16") else 4,
        reference=_strategy(config, later) if compares else None,
        teacher=config.student.weight > 0,
        checkpointing=config.train.checkpointing,
        apart=compares and config.train.branches == "apart",
        context=config.train.context_parallel,
        videos=config.train.micro_batch_size * (2 if compares else 1) * branches,
        accumulation=accumulation_steps(config, gpus),
        buckets={name: float(zero.get(name, size)) for name, size in DEEPSPEED.items()},
    )


def _strategy(config: Config, later: bool) -> str:
    if config.reference.strategy == "auto":
        return "adapter" if config.train.lora and not later else "copy"
    return config.reference.strategy
