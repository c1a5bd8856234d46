"""How long a training step's arithmetic takes at its devices' peak; over the step's seconds it is the log's `mfu`."""

import torch

from alignkit.config import Config
from alignkit.errors import ModelError
from alignkit.planning.constants import GPUS, Gpu
from alignkit.planning.counting import forward_of
from alignkit.planning.memory import MASTER, parameters
from alignkit.planning.outline import outline
from alignkit.planning.regime import regime
from alignkit.planning.work import step_work
from alignkit.training.distributed import Process

DONE_TWICE = ("recomputing", "forward of both sides")
"""Parts of a step that save memory and are not the model's own work: PaLM's definition (arXiv 2204.02311, appendix B)
leaves them out."""


def seconds_at_peak(config: Config, process: Process, later: bool) -> float | None:
    """Of a step of `config` on all processes, a GPU each; later: of a stage that another one hands its weights to.

    None where the peak of this process's device is not in the table, or the model's sizes are not on this machine.
    """
    name = torch.cuda.get_device_name(process.device) if process.device.type == "cuda" else ""
    gpu = next((gpu for gpu in GPUS.values() if gpu.device == name), None)
    return None if gpu is None else seconds_on(gpu, config, process.world_size, later)


def seconds_on(gpu: Gpu, config: Config, gpus: int, later: bool) -> float | None:
    try:
        found = outline(config)
    except ModelError:
        return None
    run = regime(config, gpus, later=later)
    forward = forward_of(found, config, run.dtype)
    flops = step_work(config, run, parameters(found, config, run.dtype), forward, gpu).flops
    own = sum(size for part, size in flops.items() if part not in DONE_TWICE)
    return own / (gpus * (gpu.fp32 if run.width == MASTER else gpu.peak))
