"""DeepSpeed's settings: a preset, what our own sections imply, and on top the user's keys, looked at before anything
loads."""

import copy
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from importlib.util import find_spec
from typing import Any

import torch

from alignkit.config import Config, changed
from alignkit.config.batches import accumulation_steps
from alignkit.config.sections import OURS
from alignkit.errors import ConfigError
from alignkit.models import working_dtype
from alignkit.training.distributed import Process

# the fastest first
PRESETS: dict[str, dict[str, Any]] = {
    "zero2": {"stage": 2},
    "zero3": {"stage": 3},
    "zero3-offload": {
        "stage": 3,
        "offload_param": {"device": "cpu", "pin_memory": True},
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
    },
}

FLOPS = "its count stops at diffusers' attention; `alignkit plan` says a step's FLOPs, the training's log its mfu"
ENGINE = "a checkpoint's manifest is of what DeepSpeed's own engine has written by then"
NOT_HERE = {
    "flops_profiler.enabled": FLOPS,
    "autotuning.enabled": "DeepSpeed's launcher tunes by runs of its own; `alignkit plan` says what fits and its time",
    "checkpoint.load_universal": "a run's checkpoints are of another form; train.reshape converts one where need be",
    "checkpoint.writer": ENGINE,
    "datastates_ckpt": ENGINE,
    "tensor_parallel.autotp_size": "its plans are of language models; train.context_parallel is for what one GPU lacks",
}
"""Keys that DeepSpeed takes, and with which a run would end in a traceback, or could not be resumed."""
MONITORS = {"wandb": "wandb", "comet": "comet_ml", "tensorboard": "tensorboard"}  # and the packages that they import

NOT_TAKEN = ArithmeticError, AssertionError, AttributeError, LookupError, NotImplementedError, TypeError, ValueError
"""What DeepSpeed raises for a setting that it cannot work with, as likely as not without its name."""


def deepspeed_config(config: Config, process: Process) -> dict[str, Any]:
    """DeepSpeed's own JSON: the preset, what the other sections imply, then the user's keys on top."""
    train = config.train
    if config.deepspeed.preset not in PRESETS:
        raise ConfigError(
            "deepspeed.preset: 'auto' is resolved by alignkit.planning.preset.resolved(config, process), as the "
            "command does; call it before train()"
        )
    base = {
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": accumulation_steps(config, process.world_size),
        # of as many pairs as processes think they have: DeepSpeed knows of no context groups
        "train_batch_size": train.global_batch_size * train.context_parallel,
        "gradient_clipping": train.max_grad_norm,
        "zero_optimization": copy.deepcopy(PRESETS[config.deepspeed.preset]),
        "zero_force_ds_cpu_optimizer": False,  # else offload refuses any optimizer but DeepSpeed's own
        "zero_allow_untested_optimizer": train.optimizer != "adamw",
        # whose default differs between DeepSpeed's versions; without it a gradient that is not finite is applied
        "bf16": {"enabled": working_dtype(config.model, process.device) == torch.bfloat16, "check_grad_overflow": True},
        "data_types": {"grad_accum_dtype": "fp32"},  # 16 micro-batches added up in bf16 are off by half a percent
        "steps_per_print": None,
    }
    settings = _merged(base, _at_home(config.deepspeed.config))
    zero = settings["zero_optimization"]
    if settings["bf16"].get("bf16_master_weights_and_grads"):
        raise ConfigError(
            "deepspeed.config: bf16.bf16_master_weights_and_grads keeps no fp32 weights, and small updates are rounded "
            "away; for less memory use train.optimizer: adamw_bf16 or adamw_8bit"
        )
    for part in ("offload_param", "offload_optimizer"):
        if zero.get(part, "") is None:  # as DeepSpeed's own default is
            del zero[part]
    moments = zero.get("offload_optimizer")
    if train.optimizer == "adamw_8bit" and isinstance(moments, dict) and moments.get("device", "none") != "none":
        raise ConfigError(
            "train.optimizer: 'adamw_8bit' is not for moments in main memory; leave out offload_optimizer"
        )
    if zero["stage"] == 0 and settings["bf16"]["enabled"]:
        raise ConfigError(
            "deepspeed.config: zero_optimization.stage 0 keeps no fp32 weights beside bf16 ones; use 1, 2 or 3"
        )
    return settings


def check_deepspeed(config: Config, process: Process) -> None:
    """Raises ConfigError, before any weight is read, for keys of `deepspeed.config` that DeepSpeed does not take, or
    takes and cannot use here."""
    if not config.deepspeed.config:
        return
    from pydantic import ValidationError

    if config.deepspeed.preset not in PRESETS:  # auto: not resolved yet
        config = changed(config, {"deepspeed": {"preset": "zero3"}}, "deepspeed.preset")
    settings = _settings(config, process)
    _check_use(config, working_dtype(config.model, process.device) == torch.bfloat16)
    read, problem, odd = _Noting(copy.deepcopy(settings)), None, list[tuple[str, Any, str]]()
    try:
        with _models_noting(odd):
            _read(read)
    except ValidationError as error:
        found = error.errors()[0]
        names = [str(name) for name in found["loc"]]
        key = ".".join([*_section_of(settings, names, found["input"]), *names])
        said = found["msg"][:1].lower() + found["msg"][1:]
        raise ConfigError(f"deepspeed.config: {key}: {said}, got {found['input']!r}") from None
    except Exception as error:  # of its own kinds, or of code that met another type than it expects
        problem = error
    odd = [(".".join([*_section_of(settings, [name], given), name]), given, kind) for name, given, kind in odd]
    for key, given, kind in [*read.odd(), *odd]:
        raise ConfigError(f"deepspeed.config: {key}: should be {kind}, got {given!r}")
    if problem is not None:
        guilty = [key for key in config.deepspeed.config if _is_taken(_settings(_without(config, key), process))]
        raise ConfigError(refused(problem, *guilty[:1])) from problem
    for key, value in config.deepspeed.config.items():
        if key not in read.asked_for:
            raise ConfigError(_unknown(str(key), read.asked_for))
        section = dict.__getitem__(read, key)
        if isinstance(value, dict) and section.asked_for:  # else it is looked over as a whole, or later
            names = [name for name in value if name not in section.asked_for]
            if names and _is_taken(settings | {key: settings[key] | {"a key that nobody knows": None}}):
                raise ConfigError(_unknown(f"{key}.{names[0]}", {f"{key}.{known}" for known in section.asked_for}))
    for part in ("offload_param", "offload_optimizer"):
        given = settings["zero_optimization"].get(part) or {}
        if given.get("device") == "nvme" and not given.get("nvme_path"):
            raise ConfigError(
                f"deepspeed.config: zero_optimization.{part}.nvme_path: missing; name a folder of a local disk"
            )


def _check_use(config: Config, in_bf16: bool) -> None:
    """Raises ConfigError for what is taken, and ends a run or changes it unseen."""
    given = config.deepspeed.config
    half = given.get("bf16")
    if isinstance(half, dict) and half.get("enabled", in_bf16) is not in_bf16:
        raise ConfigError(f"deepspeed.config: bf16.enabled: this is model.dtype, here {'bf16' if in_bf16 else 'fp32'}")
    for key, why in NOT_HERE.items():
        value: Any = given
        for name in key.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        if value not in (None, False):
            raise ConfigError(f"deepspeed.config: {key}: not for alignkit's runs, {why}; leave it out")
    for name, package in MONITORS.items():
        section = given.get(name)
        if isinstance(section, dict) and section.get("enabled") is True and find_spec(package) is None:
            raise ConfigError(f"deepspeed.config: {name}.enabled: needs {package}, which is not installed: install it")
    steps = given.get("steps_per_print")
    if steps is not None and (_other_kind(steps, 1) or steps < 1):
        raise ConfigError(f"deepspeed.config: steps_per_print: should be a whole number from 1 on, got {steps!r}")
    if str(given.get("data_types", {}).get("grad_accum_dtype")).endswith("int8"):
        raise ConfigError("deepspeed.config: data_types.grad_accum_dtype: int8 holds no gradient; use fp32 or bf16")


def _other_kind(given: Any, like: Any) -> str:
    """What `given` should be to be of the kind of `like`, where that is a switch or a number; empty where it is."""
    if isinstance(like, bool):
        return "" if isinstance(given, bool) else "true or false"
    if not isinstance(like, int | float):
        return ""
    if isinstance(given, bool) or not isinstance(given, int | float):
        return "a number"
    return "" if isinstance(like, float) or isinstance(given, int) or given.is_integer() else "a whole number"


@contextmanager
def _models_noting(odd: list[tuple[str, Any, str]]) -> Iterator[None]:
    """What DeepSpeed's models read of another kind than it was given, "3" as 3 and 1 as true, is added to `odd`: code
    beside them reads the same keys, and takes them as they are."""
    from deepspeed.runtime.config_utils import DeepSpeedConfigModel

    read = DeepSpeedConfigModel.__init__

    def note(self: Any, *arguments: Any, **given: Any) -> None:
        read(self, *arguments, **given)
        for name, field in type(self).model_fields.items():
            for key in {name, field.alias} & given.keys():
                kind = _other_kind(given[key], vars(self).get(name))
                if kind and given[key] != "auto":  # which it leaves out
                    odd.append((key, given[key], kind))

    DeepSpeedConfigModel.__init__ = note
    try:
        yield
    finally:
        DeepSpeedConfigModel.__init__ = read


class _Noting(dict[str, Any]):
    """Settings that note, section by section, which of their keys are asked for, and with which default: DeepSpeed
    passes over those that it does not know."""

    def __init__(self, settings: dict[str, Any]):
        super().__init__({key: _Noting(value) if isinstance(value, dict) else value for key, value in settings.items()})
        self.asked_for: dict[str, Any] = {}

    def odd(self) -> Iterator[tuple[str, Any, str]]:
        """Keys of another kind than their defaults, what they were given, and what they should be."""
        for key, given in self.items():
            if isinstance(given, _Noting):
                yield from ((f"{key}.{name}", *rest) for name, *rest in given.odd())
            elif kind := _other_kind(given, self.asked_for.get(key)):
                yield key, given, kind

    def __contains__(self, key: Any) -> bool:
        self.asked_for.setdefault(key)
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.asked_for.setdefault(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.asked_for[key] = default
        return super().get(key, default)

    def keys(self) -> Any:
        return self  # in which it looks by `key in settings.keys()`


def _unknown(key: str, known: Collection[str]) -> str:
    alike = get_close_matches(key, sorted(known), 1)
    meant = f"; is {OURS.get(alike[0], alike[0])} meant?" if alike else "; leave it out"
    return f"deepspeed.config: {key}: DeepSpeed knows no such key{meant}"


def _settings(config: Config, process: Process) -> dict[str, Any]:
    settings = deepspeed_config(config, process)
    del settings["train_batch_size"]  # of more processes than there may be yet
    return settings


def _without(config: Config, key: str) -> Config:
    rest = {name: value for name, value in config.deepspeed.config.items() if name != key}
    return config.model_copy(update={"deepspeed": config.deepspeed.model_copy(update={"config": rest})})


def _read(settings: dict[str, Any]) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig, DtypeEnum

    DeepSpeedConfig(settings)
    DtypeEnum(settings["data_types"]["grad_accum_dtype"])  # which it reads when all is loaded


def _is_taken(settings: dict[str, Any]) -> bool:
    try:
        _read(copy.deepcopy(settings))
    except Exception:  # whatever it is: only whether it is taken is asked
        return False
    return True


def _section_of(settings: dict[str, Any], names: list[str], given: Any) -> list[str]:
    """The names of the sections in which `names`, one in the other, lead to what was given."""
    for key, value in settings.items():
        if isinstance(value, dict):
            found: Any = value
            for name in names:
                found = found.get(name) if isinstance(found, dict) else None
            if found == given and isinstance(found, bool) == isinstance(given, bool):
                return [key]
            if deeper := _section_of(value, names, given):
                return [key, *deeper]
    return []


def refused(error: Exception, *keys: str) -> str:
    said = str(error).splitlines()[0] if str(error) else type(error).__name__
    return f"deepspeed.config: {''.join(f'{key}: ' for key in keys)}DeepSpeed does not take it: {said}"


def _at_home(value: Any) -> Any:
    """~/tb, which DeepSpeed takes for a folder named ~, is a folder of the user's."""
    if isinstance(value, dict):
        return {key: _at_home(item) for key, item in value.items()}
    return os.path.expanduser(value) if isinstance(value, str) else value


def _merged(base: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in extra.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = _merged(result[key], value) if both else value
    return result
