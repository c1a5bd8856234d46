"""The model of a configuration without its weights: on the meta device, from its config files, without the network."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache
from torch import nn

from alignkit.config import Config, ModelSection, shipped_config
from alignkit.errors import ModelError
from alignkit.models import VideoModel, family_module, shipped_model
from alignkit.training.lora import add_lora

SHIPPED = {
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": "wan2.1-1.3b",
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": "wan2.1-14b",
    "THUDM/CogVideoX-2b": "cogvideox-2b",
    "THUDM/CogVideoX-5b": "cogvideox-5b",
}
"""Models of the hub whose sizes come with alignkit, in configs/architectures."""
PARTS = ("transformer", "vae", "text_encoder")


@dataclass(frozen=True)
class Outline:
    """architecture: of the transformer. model: its family's, with nothing loaded. vae, text: their parameters.
    counted: activations that were counted already, by all that they depend on."""

    section: ModelSection
    architecture: dict
    model: VideoModel
    vae: int
    text: int
    text_width: int
    counted: dict[tuple, float] = field(default_factory=dict)

    @property
    def layers(self) -> int:
        return self.architecture["num_layers"]

    def network(self, layers: int, dtype: torch.dtype, lora=None) -> nn.Module:
        """The transformer with so many blocks, on the meta device, as it is trained."""
        with torch.device("meta"):
            network = family_module(self.section.family).build_transformer(self.architecture | {"num_layers": layers})
            if lora:
                add_lora(network, lora, seed=0)
            for name, parameter in list(network.named_parameters()):  # buffers stay as they are, as in a run
                owner, _, leaf = name.rpartition(".")
                own = nn.Parameter(parameter.to(dtype), requires_grad=parameter.requires_grad)
                setattr(network.get_submodule(owner), leaf, own)
        return network.train()


def outline(config: Config) -> Outline:
    """Raises ModelError where a model's sizes are not on this machine."""
    section = config.model
    transformer, vae, text = _configs(section)
    family = family_module(section.family)
    _check_class(section, transformer)
    with torch.device("meta"):
        from transformers import AutoConfig, AutoModelForTextEncoding

        text = AutoConfig.for_model(text.pop("model_type"), **text)
        encoder = AutoModelForTextEncoding.from_config(text)
        model, decoder = family.outline(vae, section.max_sequence_length)
    return Outline(section, transformer, model, _size(decoder), _size(encoder), text.d_model)


def _configs(section: ModelSection) -> list[dict]:
    if section.path in SHIPPED:
        names = (SHIPPED[section.path], *(f"{part}-{_of_family(SHIPPED[section.path])}" for part in ("vae", "text")))
        return [json.loads(shipped_config(f"architectures/{name}.json").read_text()) for name in names]
    folder = shipped_model(section.family) if section.path == "tiny" else Path(section.path).expanduser()
    if folder.is_dir():
        return [_read(folder / part / "config.json") for part in PARTS]
    known = (try_to_load_from_cache(section.path, f"{part}/config.json", revision=section.revision) for part in PARTS)
    found = [file for file in known if isinstance(file, str)]
    if len(found) < len(PARTS):
        raise ModelError(
            f"model.path: {section.path}: its sizes do not come with alignkit and are not in this machine's cache; "
            f"where there is a network: hf download {section.path} --include '*/config.json'"
        )
    return [_read(Path(file)) for file in found]


def _of_family(name: str) -> str:
    """ "cogvideox-2b" to "cogvideox": sizes of one family share VAE and text encoder."""
    return name.rpartition("-")[0]


def _read(file: Path) -> dict:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"model.path: {file}: cannot read: {error}") from None


def _check_class(section: ModelSection, transformer: dict) -> None:
    wanted = family_module(section.family).TRANSFORMER.__name__
    if transformer.get("_class_name", wanted) != wanted:
        raise ModelError(f"model.path: {section.path}: a {transformer['_class_name']}, not a {wanted} (model.family)")


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
