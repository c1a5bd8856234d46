"""Writes the trained model, or its adapters, for plain diffusers, from the engine's fp32 master weights."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import diffusers
import torch
from torch import Tensor

from alignkit.config import Config, LoraSection, ModelSection
from alignkit.errors import DataError
from alignkit.files import flush, write_json
from alignkit.models import VideoModel
from alignkit.models.folder import LORA_FILE
from alignkit.progress import say
from alignkit.training.lora import peft_weights


def export_folder(config: Config) -> Path:
    return config.output.dir / "export"


def averaged(target: Path) -> Path:
    """Beside an export: where the average of `train.ema` goes."""
    return target.with_name(f"{target.name}-ema")


def export_record(target: Path) -> Path:
    """Beside an export: which stage's weights it holds, where a chain made it."""
    return target.with_name(f"{target.name}.json")


def aligned_section(config: Config) -> ModelSection:
    """The `model` section that loads what `config`'s run exported. Raises DataError before it has."""
    folder, section = export_folder(config), config.model
    if config.sample.weights == "ema":
        folder = averaged(folder)
    if (folder / LORA_FILE).is_file():
        return section.model_copy(update={"lora": (*section.lora, folder)})
    if not folder.is_dir():
        raise DataError(f"{folder}: no exported model; run 'alignkit train' with this configuration first")
    return section.model_copy(update={"path": str(folder), "revision": None, "lora": ()})


def export(model: VideoModel, weights: dict[str, Tensor], target: Path, few_steps: int | None = None) -> None:
    """Write `target` as a diffusers folder: `model`'s own with the weights of the network that was trained replaced by
    `weights` (fp32); of two experts the other one stays as it was.

    In bf16 most of a small update would round back to the base. few_steps: of a student, whose pipeline then samples as
    it was trained to, with that `num_inference_steps` and guidance_scale=1.
    """
    with _appearing_whole(target) as partial:
        base = model.local_folder()
        others = [name for name in _folders(base) if name != model.part]
        shutil.copytree(
            base,
            partial,
            # what else somebody keeps there, this run for example, is no part of the model
            ignore=lambda at, names: [n for n in names if Path(at) == base and (base / n).is_dir() and n not in others],
            ignore_dangling_symlinks=True,
        )
        with torch.device("meta"):
            fresh = type(model.network).from_config(model.network.config)
        result = fresh.load_state_dict(weights, strict=True, assign=True)
        assert not result.missing_keys and not result.unexpected_keys
        fresh.save_pretrained(partial / model.part)
        if few_steps:
            scheduler = model.few_step_scheduler(few_steps)
            scheduler.save_pretrained(partial / "scheduler")
            index = json.loads((partial / "model_index.json").read_text())
            index["scheduler"] = ["diffusers", type(scheduler).__name__]
            write_json(partial / "model_index.json", index)


def _folders(base: Path) -> list[str]:
    """Of a pipeline's parts."""
    index = json.loads((base / "model_index.json").read_text())
    return [name for name, value in index.items() if isinstance(value, list) and (base / name).is_dir()]


def export_lora(model: VideoModel, weights: dict[str, Tensor], section: LoraSection, target: Path) -> None:
    """Write `target/pytorch_lora_weights.safetensors` (fp32), with its alpha, for `pipe.load_lora_weights(target)`; of
    a low expert with `load_into_transformer_2=True`."""
    pipeline = diffusers.DiffusionPipeline.load_config(str(model.local_folder()))["_class_name"]
    layers, settings = peft_weights(model.transformer, weights, section)
    with _appearing_whole(target) as partial:
        getattr(diffusers, pipeline).save_lora_weights(
            str(partial), transformer_lora_layers=layers, transformer_lora_adapter_metadata=settings
        )


@contextmanager
def _appearing_whole(target: Path) -> Iterator[Path]:
    """A folder to write to that takes the place of `target` when everything is in it, and not before."""
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    yield partial
    for path in (*partial.rglob("*"), partial):
        flush(path)
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.rename(target, old)
    os.rename(partial, target)
    flush(target.parent)
    shutil.rmtree(old, ignore_errors=True)
    say(f"exported to {target}")
