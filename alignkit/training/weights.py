"""The fp32 values a run starts from, a tensor at a time, and networks and fp32 masters filled with them.

In bf16 the network holds rounded weights; the optimizer's fp32 masters hold the files' own values, so that training
starts from the base itself and not from its rounding.
"""

import ctypes
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from alignkit.config import Config, ModelSection
from alignkit.errors import AlignkitError, ModelError
from alignkit.models import VideoModel, family_module, load_model
from alignkit.models.weights import check_weight_files

Read = Callable[[str], Tensor]


class StartingWeights:
    """`weights.share(name, shape, device)` is that parameter's starting value, fp32, on every process.

    The first process alone reads them. `read(name)` returns a tensor of any float dtype or raises ModelError.
    """

    def __init__(self, read: Read):
        self._read = read

    def share(self, name: str, shape: torch.Size, device: torch.device) -> Tensor:
        """Every process must call this. Raises, on all of them, the first one's ModelError: a tensor that is missing,
        damaged or of another shape."""
        tensor = _agree(lambda: self._checked(name, shape), share=False)
        # a copy of its own: a view of the mapped file would keep the whole file in memory
        tensor = torch.empty(shape, device=device) if tensor is None else tensor.to(device, torch.float32, copy=True)
        torch.distributed.broadcast(tensor, src=0)
        return tensor

    def _checked(self, name: str, shape: torch.Size) -> Tensor:
        tensor = self._read(name)
        if tensor.shape != shape:
            raise ModelError(f"model.path: {name} is {list(tensor.shape)}, expected {list(shape)}")
        return tensor


@dataclass(frozen=True)
class Start:
    """What a run starts from: the network's weights, and the adapters' values where an earlier stage hands them on.

    later: whether an earlier stage hands on either.
    """

    base: StartingWeights
    adapters: dict[str, Tensor] | None = None
    later: bool = False


def open_start(config: Config, model: VideoModel, handed: Path | None = None) -> Start:
    """The base's own weights, or what an earlier stage trained, from its file `handed` (`alignkit.training.masters`);
    with `train.lora` that holds adapters, which go on top of the base. Every process calls this."""
    if handed is None:
        return Start(base_weights(config.model, model))
    if config.train.lora:
        return Start(base_weights(config.model, model), load_file(handed), later=True)
    return Start(StartingWeights(lambda name: _read_file(handed, name)), later=True)


def base_weights(section: ModelSection, model: VideoModel) -> StartingWeights:
    """The weights of `model`'s own network that is trained, with the adapters of `section.lora` added; every process
    calls this.

    With adapters to merge the first process holds one whole copy for as long as the result is kept; without, none
    does. Raises ModelError for files that are missing or damaged.
    """
    if section.lora:
        network = _agree(lambda: load_model(section, with_encoders=False).network, share=False)
        merged = {} if network is None else {name: value.detach() for name, value in network.named_parameters()}
        return StartingWeights(merged.__getitem__)
    names = [name for name, _ in empty_network(model).named_parameters()]
    places = _agree(lambda: _places(model.local_folder() / model.part, section.variant, names))
    return StartingWeights(lambda name: _read_file(places[name], name))


def empty_network(model: VideoModel) -> nn.Module:
    """The network of `model` that is trained with every parameter on the meta device, and its buffers."""
    file = model.local_folder() / model.part / "config.json"
    try:
        config = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"model.path: {file}: cannot read: {error}") from None
    with init_empty_weights(include_buffers=False):
        return family_module(model.family).build_transformer(config)


def load_whole(model: VideoModel, weights: StartingWeights, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """`model`'s transformer, frozen, with its parameters in `dtype` and its buffers as they are built, fp32."""
    network = empty_network(model)
    for name, empty in list(network.named_parameters()):
        _put(network, name, nn.Parameter(weights.share(name, empty.shape, device).to(dtype), requires_grad=False))
    return network.to(device).eval()


def load_partitioned(
    model: VideoModel, weights: StartingWeights, settings: dict[str, Any], dtype: torch.dtype, device: torch.device
) -> nn.Module:
    """The same with every parameter partitioned among the processes as soon as it is there, so that no process ever
    holds a whole copy: a node holds one copy, shared out, and one tensor more.

    settings: DeepSpeed's configuration, ZeRO stage 3.
    """
    network = empty_network(model)
    partition = None
    for name, empty in list(network.named_parameters()):
        parameter = nn.Parameter(weights.share(name, empty.shape, device).to(dtype), requires_grad=False)
        partition = partition or _partitioner(parameter, settings, dtype)
        partition(parameter)
        _put(network, name, parameter)
        _give_back_freed_memory()
    _move_buffers(network, device)  # which DeepSpeed leaves where they are once parameters are partitioned
    return network.eval()


def set_masters(engine: Any, values: Callable[[str, torch.Size, torch.device], Tensor]) -> None:
    """Make `values(name, shape, device)`, fp32, the optimizer's fp32 weights; every process calls this.

    DeepSpeed makes them from the network's own weights, which in bf16 are rounded.
    """
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        value = values(name, getattr(parameter, "ds_shape", parameter.shape), engine.device)
        if not hasattr(parameter, "ds_id"):
            safe_set_full_fp32_param(parameter, value)
            continue
        safe_set_local_fp32_param(parameter, own_part(value, parameter))
        _give_back_freed_memory()


def own_part(value: Tensor, parameter: Any) -> Tensor:
    """This process's part, flat, of a whole `value` of a parameter that ZeRO-3 has partitioned; zeros past its end."""
    # by hand: DeepSpeed's own division of a whole tensor fails where its size does not divide by the processes
    size = parameter.ds_tensor.numel()
    padded = value.new_zeros(size * torch.distributed.get_world_size())
    padded[: value.numel()] = value.flatten()
    return padded[torch.distributed.get_rank() * size :][:size]


def _move_buffers(network: nn.Module, device: torch.device) -> None:
    for name, buffer in list(network.named_buffers()):
        _put(network, name, buffer.to(device))


def _put(network: nn.Module, name: str, tensor: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(network.get_submodule(owner), leaf, tensor)


def _partitioner(first: Any, settings: dict[str, Any], dtype: torch.dtype) -> Callable[[nn.Parameter], None]:
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


def _agree(action: Callable[[], Any], share: bool = True) -> Any:
    """`action()`'s result, taken on the first process, on all of them (`share`) or there alone, None elsewhere; an
    AlignkitError that it raises is raised by all."""
    result, problem = None, None
    if torch.distributed.get_rank() == 0:
        try:
            result = action()
        except AlignkitError as error:
            problem = error
    told = [problem, result if share else None]
    torch.distributed.broadcast_object_list(told, src=0)
    if told[0]:
        raise told[0]
    return told[1] if share else result


def _places(folder: Path, variant: str | None, names: list[str]) -> dict[str, Path]:
    """The file of each parameter."""
    places: dict[str, Path] = {}
    for file in check_weight_files(folder, variant):
        try:
            with safe_open(file, "pt") as opened:
                places |= dict.fromkeys(opened.keys(), file)
        except (OSError, SafetensorError) as error:
            raise ModelError(f"model.path: {file}: cannot read: {error}") from error
    missing = [name for name in names if name not in places]
    if missing:
        raise ModelError(f"model.path: {folder}: holds no {missing[0]} (and {len(missing) - 1} more are missing)")
    return places


def _read_file(file: Path, name: str) -> Tensor:
    try:
        with safe_open(file, "pt") as opened:
            return opened.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"model.path: {file}: cannot read {name}: {error}") from error
