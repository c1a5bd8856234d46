"""Loads a transformer into ZeRO-3 one tensor at a time, so that no process ever holds a whole copy."""

import ctypes
import json
from contextlib import suppress
from pathlib import Path

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch import nn

from alignkit.errors import ModelError
from alignkit.models import family_module

SINGLE, INDEX = "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors.index.json"


def load_partitioned(model, settings: dict, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """`model`'s transformer with every weight in `dtype` and already partitioned among the processes.

    settings: DeepSpeed's configuration, ZeRO stage 3. The first process reads the files, a tensor at a time, and
    broadcasts it; each keeps its part. So a node holds one copy, shared out, and one tensor more. Every process
    must call this. Raises ModelError for files that are missing or damaged, tensors that are missing or of
    another shape; the first process says so to the others, which raise it too.
    """
    folder = model.local_folder() / "transformer"
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"model.path: {folder / 'config.json'}: cannot read: {error}") from None
    with init_empty_weights(include_buffers=False):
        network = family_module(model.family).build_transformer(config)
    first = torch.distributed.get_rank() == 0
    places = _agree(lambda: _places(folder, network) if first else None)
    partition = None
    for name, empty in list(network.named_parameters()):
        tensor = _agree(lambda name=name, empty=empty: _read(places[name], name, empty) if first else None, False)
        if tensor is None:
            tensor = torch.empty(empty.shape)
        # a copy of its own: a view of the mapped file would keep the whole file in memory
        parameter = nn.Parameter(tensor.to(device, dtype, copy=True), requires_grad=False)
        partition = partition or _partitioner(parameter, settings, dtype)
        partition(parameter)
        owner, _, leaf = name.rpartition(".")
        setattr(network.get_submodule(owner), leaf, parameter)
        del tensor
        _give_back_freed_memory()
    return network.eval()


def _partitioner(first: nn.Parameter, settings: dict, dtype: torch.dtype):
    """Partitions `first` by `deepspeed.zero.Init`; returns what does the same to the next ones."""
    import deepspeed

    deepspeed.zero.Init(module=nn.ParameterList([first]), config_dict_or_path=settings, dtype=dtype)

    def partition(parameter: nn.Parameter) -> None:
        if parameter is not first:
            first.convert_to_zero_parameters(param_list=[parameter])

    return partition


def _give_back_freed_memory() -> None:
    """glibc keeps the holes that freed tensors leave between the parts that stay: a quarter of a copy in all."""
    with suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _agree(action, share: bool = True):
    """`action()`'s result on every process (`share`) or each its own; a ModelError of one is raised by all."""
    result, problem = None, None
    try:
        result = action()
    except ModelError as error:
        problem = str(error)
    told = [problem, result if share else None]
    torch.distributed.broadcast_object_list(told, src=0)
    if told[0]:
        raise ModelError(told[0])
    return told[1] if share else result


def _places(folder: Path, network: nn.Module) -> dict[str, Path]:
    """The file of each parameter."""
    listing = folder / INDEX if (folder / INDEX).is_file() else folder / SINGLE
    try:
        if listing.name == INDEX:
            places = {name: folder / file for name, file in json.loads(listing.read_text())["weight_map"].items()}
        else:
            with safe_open(listing, "pt") as file:
                places = dict.fromkeys(file.keys(), listing)
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise ModelError(f"model.path: {listing}: cannot read: {error}") from error
    missing = [name for name, _ in network.named_parameters() if name not in places]
    if missing:
        raise ModelError(f"model.path: {listing}: holds no {missing[0]} (and {len(missing) - 1} more are missing)")
    return places


def _read(file: Path, name: str, empty: torch.Tensor) -> torch.Tensor:
    try:
        with safe_open(file, "pt") as opened:
            tensor = opened.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"model.path: {file}: cannot read {name}: {error}") from error
    if tensor.shape != empty.shape:
        raise ModelError(f"model.path: {file}: {name} is {list(tensor.shape)}, expected {list(empty.shape)}")
    return tensor
