"""The model of a configuration without its weights: on the meta device, from its config files, without the network."""

import json
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from torch import nn

from alignkit.config import Config, LoraSection, ModelSection, shipped_config
from alignkit.errors import ModelError
from alignkit.models import VideoModel, family_module, shipped_model
from alignkit.models.experts import boundary_of
from alignkit.training.lora import add_lora

SHIPPED = {
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": "wan2.1-1.3b",
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": "wan2.1-14b",
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": "wan2.2-a14b",
    "THUDM/CogVideoX-2b": "cogvideox-2b",
    "THUDM/CogVideoX-5b": "cogvideox-5b",
}
"""Models of the hub whose sizes come with alignkit, in configs/architectures."""
EXPERTS = {
    "wan2.2-a14b": {
        "boundary_ratio": 0.875,
        **{part: ["diffusers", "WanTransformer3DModel"] for part in ("transformer", "transformer_2")},
    }
}
"""Of their model_index.json, what makes two networks of one architecture."""
PARTS = ("transformer", "vae", "text_encoder")


@dataclass(frozen=True)
class Outline:
    """architecture: of the network that is trained. model: its family's, with nothing loaded. autoencoder: the VAE, on
    the meta device. vae, text: their parameters. networks: 2 where it is one of two experts, which sample together.
    counted: what was counted already, by all that it depends on."""

    family: str
    architecture: dict[str, Any]
    model: VideoModel
    autoencoder: Any
    vae: int
    text: int
    text_width: int
    networks: int = 1
    counted: dict[tuple[Any, ...], Any] = field(default_factory=dict)

    @property
    def layers(self) -> int:
        return self.architecture["num_layers"]

    def network(self, layers: int, dtype: torch.dtype, lora: LoraSection | None = None) -> nn.Module:
        """The transformer with so many blocks, on the meta device, as it is trained."""
        with torch.device("meta"):
            network = family_module(self.family).build_transformer(self.architecture | {"num_layers": layers})
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
    index, *parts = _configs(section)
    experts = boundary_of(section.path, index, section.expert) is not None
    _check_class(section, parts[0])
    return _outline(section.family, json.dumps(parts), section.max_sequence_length, 1 + experts)


@lru_cache(8)
def _outline(family: str, configs: str, max_sequence_length: int, networks: int) -> Outline:
    """The same one for the same model, with all that was counted of it."""
    transformer, vae, text = json.loads(configs)
    with torch.device("meta"):
        from transformers import AutoConfig, AutoModelForTextEncoding

        text = AutoConfig.for_model(text.pop("model_type"), **text)
        encoder = AutoModelForTextEncoding.from_config(text)
        model, decoder = family_module(family).outline(vae, max_sequence_length)
    autoencoder = decoder.eval().requires_grad_(False)
    return Outline(family, transformer, model, autoencoder, _size(decoder), _size(encoder), text.d_model, networks)


def _configs(section: ModelSection) -> list[dict[str, Any]]:
    """The model's index and its PARTS."""
    if section.path in SHIPPED:
        family = _of_family(SHIPPED[section.path])
        names = (f"{part}-{family}" for part in ("vae", "text"))
        found = [_read(shipped_config(f"architectures/{name}.json")) for name in (SHIPPED[section.path], *names)]
        return [EXPERTS.get(SHIPPED[section.path], {}), *found]
    folder = shipped_model(section.family) if section.path == "tiny" else Path(section.path).expanduser()
    files = ["model_index.json", *(f"{part}/config.json" for part in PARTS)]
    if folder.is_dir():
        return [_read(folder / file) for file in files]
    known = (try_to_load_from_cache(section.path, file, revision=section.revision) for file in files)
    cached = [file for file in known if isinstance(file, str)]
    if len(cached) < len(files):
        raise ModelError(
            f"model.path: {section.path}: its sizes do not come with alignkit and are not in this machine's cache; "
            f"where there is a network: hf download {section.path} --include '*/config.json' model_index.json"
        )
    return [_read(Path(file)) for file in cached]


def _of_family(name: str) -> str:
    """ "cogvideox-2b" to "cogvideox": sizes of one family share VAE and text encoder; Wan2.2's A14B has Wan2.1's."""
    return name.rpartition("-")[0].replace("wan2.2", "wan2.1")


def _read(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"model.path: {file}: cannot read: {error}") from None


def _check_class(section: ModelSection, transformer: dict[str, Any]) -> None:
    wanted = family_module(section.family).TRANSFORMER.__name__
    if transformer.get("_class_name", wanted) != wanted:
        raise ModelError(f"model.path: {section.path}: a {transformer['_class_name']}, not a {wanted} (model.family)")


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
