"""What the model families share: a diffusers folder or hub id, its parts, its text cache, its fingerprint."""

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import torch
from diffusers import DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SCHEDULER_CONFIG_NAME
from diffusers.utils import convert_unet_state_dict_to_peft
from einops import rearrange
from huggingface_hub import get_hf_file_metadata, hf_hub_url, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors.torch import load_file
from torch import Tensor, nn

from alignkit.errors import AlignkitError, ConfigError, ModelError
from alignkit.models.experts import PARTS, Experts, boundary_of
from alignkit.models.weights import check_weight_files, file_digest, fingerprint_of, variant_of
from alignkit.progress import say
from alignkit.schedules import Schedule, one_step

REMEMBERED_PROMPTS = 64  # an embedding of a full model takes megabytes
Watch = Callable[[int, Tensor], None]
HUB_TIMEOUT_S = 10.0
PATH_STEPS = 20  # few, so that a path of few timesteps has as many
TILE, STRIDE = 256, 192  # of the VAE, in pixels, as diffusers has Wan's
VOCABULARIES = "tokenizer.json", "spiece.model"  # of which transformers reads the first; bytes need none
SETTINGS = {"scheduler": SCHEDULER_CONFIG_NAME, "tokenizer": "tokenizer_config.json"}  # the others': config.json
LORA_FILE = "pytorch_lora_weights.safetensors"  # the name that diffusers gives it
LORA_FORMAT = "wanted: diffusers' transformer.LAYER.lora_A.weight with its transformer.LAYER.lora_B.weight"


@dataclass
class ModelFolder:
    """The parts of a model. `transformer` and `pipeline` (VAE and text) are None where they were not loaded; the
    schedule and the training path need the scheduler alone, the latents' sizes `vae_config`.

    dtype: the transformer's, and that of the text and states it is given; the other parts are fp32.
    attention: the backend that the transformer runs on, where one was chosen. context_parallel: processes that share
    its tokens. expert: which of two experts is trained, "high" or "low", boundary: the first timestep of the high one;
    None of a model with one network.
    """

    path: str
    max_sequence_length: int
    scheduler: Any
    vae_config: dict[str, Any] = field(default_factory=dict)
    transformer: Any = None
    pipeline: Any = None
    dtype: torch.dtype = torch.float32
    revision: str | None = None
    attention: str | None = None
    context_parallel: int = 1
    lora: tuple[Path, ...] = ()
    variant: str | None = None
    expert: str | None = None
    boundary: float | None = None
    _embeddings: dict[str, Tensor] = field(default_factory=dict)

    family: ClassVar[str]

    def to(self, device: torch.device | str) -> Self:
        """Move every loaded part."""
        for module in (self.transformer, *(self.pipeline.components.values() if self.pipeline else ())):
            if isinstance(module, nn.Module):
                module.to(device)
        return self

    @property
    def vae(self) -> Any:
        return self.pipeline.vae

    def tile_vae(self) -> None:
        raise NotImplementedError

    @property
    def part(self) -> str:
        """The folder of the network that is trained."""
        return PARTS[self.expert] if self.expert else "transformer"

    @property
    def own_timesteps(self) -> tuple[float, float]:
        """[first, end): those that the network which is trained is for."""
        if self.boundary is None:
            return 0.0, math.inf
        return (self.boundary, math.inf) if self.expert == "high" else (0.0, self.boundary)

    @property
    def network(self) -> Any:
        """Of `transformer`, what is trained: one of two experts, where it is both."""
        return getattr(self.transformer, self.part) if isinstance(self.transformer, Experts) else self.transformer

    def latent_grid(self, num_frames: int, height: int, width: int) -> tuple[int, int, int]:
        raise NotImplementedError

    def video_tokens(self, num_frames: int, height: int, width: int) -> int:
        """Of one video, as the network sees it: both families' patches are 2×2 latents of a frame."""
        return math.prod(self.latent_grid(num_frames, height, width)) // 4

    def schedule(self, num_steps: int) -> Schedule:
        raise NotImplementedError

    def training_path(self, u: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def encode_text(self, prompts: list[str]) -> list[Tensor]:
        """Text embeddings as `pad_text` takes them, fp32 [tokens, D] each on CPU; the last prompts are remembered."""
        found = []
        for prompt in prompts:
            if prompt not in self._embeddings:
                self._say_if_cut(prompt)
            embedding = self._embeddings.pop(prompt, None)
            self._embeddings[prompt] = self._encode_prompt(prompt) if embedding is None else embedding
            found.append(self._embeddings[prompt])
        for prompt in list(self._embeddings)[:-REMEMBERED_PROMPTS]:
            del self._embeddings[prompt]
        return found

    def _say_if_cut(self, prompt: str) -> None:
        """The pipeline cuts what is longer than `max_sequence_length`."""
        tokens = len(self.pipeline.tokenizer(prompt, verbose=False).input_ids)
        if tokens > self.max_sequence_length:
            say(
                f"a prompt of {tokens} tokens is cut to {self.max_sequence_length} (model.max_sequence_length): "
                f"{prompt:.60}…"
            )

    def _encode_prompt(self, prompt: str) -> Tensor:
        raise NotImplementedError

    def local_folder(self) -> Path:
        """The model's files on this machine; a hub model is already in the cache when its parts are loaded."""
        if Path(self.path).is_dir():
            return Path(self.path)
        return Path(snapshot_download(self.path, revision=self.revision, local_files_only=True))

    def fingerprint(self, part: str = "transformer") -> str:
        """Identifies the weights of a part: its tensors in a folder, id and commit of a hub model; of the text encoder
        its tokenizer's vocabulary too, where that is a file."""
        folder = Path(self.path)
        if folder.is_dir():
            found = fingerprint_of(folder / part, self.variant)
            if part == "transformer" and self.boundary is not None:  # both make videos
                both = [found, fingerprint_of(folder / PARTS["low"], self.variant), self.boundary]
                found = hashlib.sha256(json.dumps(both).encode()).hexdigest()[:16]
            words = [folder / "tokenizer" / name for name in VOCABULARIES if (folder / "tokenizer" / name).is_file()]
            if part == "text_encoder" and words:
                found = hashlib.sha256(found.encode() + file_digest(words[0])).hexdigest()[:16]
        else:
            where = json.dumps([self.path, self.local_folder().name])  # …/snapshots/COMMIT
            found = hashlib.sha256(where.encode()).hexdigest()[:16]
        if part != "transformer" or not self.lora:
            return found
        adapters = b"".join(file_digest(adapter / LORA_FILE) for adapter in self.lora)
        return hashlib.sha256(found.encode() + adapters + (self.expert or "").encode()).hexdigest()[:16]

    def merge_lora(self, folder: Path) -> None:
        """Add the adapters of `folder` to the weights of `network`. Raises ModelError where they are missing or do not
        fit, whole: diffusers passes over tensors that it cannot place, and draws those that are not there."""
        if not (folder / LORA_FILE).is_file():
            raise ModelError(f"model.lora: {folder / LORA_FILE}: no such file")
        self.lora = (*self.lora, folder)
        if self.transformer is None:
            return
        try:
            tensors = load_file(folder / LORA_FILE)
            self.network.load_lora_adapter(str(folder), weight_name=LORA_FILE, prefix="transformer")
        except Exception as error:  # peft, diffusers and safetensors each raise their own kinds
            raise ModelError(
                f"model.lora: {folder / LORA_FILE}: cannot load: {_line(error)} ({LORA_FORMAT})"
            ) from error
        problem = _misfit(tensors, self.network)
        if problem:
            raise ModelError(f"model.lora: {folder / LORA_FILE}: {problem} ({LORA_FORMAT})")
        self.network.fuse_lora()
        self.network.unload_lora()
        frozen(self.network)


def _misfit(tensors: dict[str, Tensor], network: Any) -> str | None:
    """How a file's `tensors` differ from the adapters that `network` was given of them; None where they do not."""
    adapters = {
        f"transformer.{name}".replace(f".{adapter}", "")
        for adapter in getattr(network, "peft_config", ())  # absent where nothing of the file was taken
        for name, _ in network.named_parameters()
        if f".{adapter}" in name
    }
    names = convert_unet_state_dict_to_peft(tensors)  # by name alone, as diffusers' loader does it
    given = {f"{name}.weight" if name.endswith(".lora_magnitude_vector") else name for name in names}
    if not given:
        return "holds no tensors"
    if unused := sorted(given - adapters):
        return f"{len(unused)} of its {len(given)} tensors, {unused[0]} first, fit no layer of this model"
    # a bias that is not there is zero
    if absent := sorted(name for name in adapters - given if not name.endswith(".lora_B.bias")):
        return f"holds no {absent[0]}, half of a pair"
    if broken := sorted(name for name, tensor in tensors.items() if not tensor.float().isfinite().all()):
        return f"{broken[0]} holds NaN or infinity"
    return None


Model = TypeVar("Model", bound=ModelFolder)


def unwatched(i: int, state: Tensor) -> None:
    """For nobody to see."""


@torch.no_grad()
def first_order_sample(
    noise: Tensor,
    predict: Callable[[Tensor, Tensor], Tensor],
    schedule: Schedule,
    dtype: torch.dtype,
    watch: Watch,
) -> Tensor:
    """Walk `schedule` from starting noise by `one_step`, fp32; predict(state, timesteps [B]) is the guided network.

    dtype: the network's, in which `watch` sees its inputs.
    """
    state = noise.float()
    for i in range(len(schedule)):
        timesteps = schedule.timesteps[i].expand(len(state)).to(state.device, torch.float32)
        watch(i, state.to(dtype))
        state = one_step(state, predict(state, timesteps).float(), *schedule.coefficients[i : i + 2])
    watch(len(schedule), state)
    return state


def grid_of(
    num_frames: int, height: int, width: int, *, temporal: int, spatial: int, patch: int
) -> tuple[int, int, int]:
    """(F, H, W) of the latents of a video of these sizes, for a VAE with these factors and `patch` latents a token.

    Raises ConfigError for sizes that do not divide.
    """
    multiple = spatial * patch
    if (num_frames - 1) % temporal:
        raise ConfigError(f"data.num_frames: must be {temporal}·n + 1 for this model, got {num_frames}")
    for name, size in (("height", height), ("width", width)):
        if size % multiple:
            raise ConfigError(f"data.{name}: must be a multiple of {multiple} for this model, got {size}")
    return ((num_frames - 1) // temporal + 1, height // spatial, width // spatial)


def to_unit(frames: Tensor, like: Any) -> Tensor:
    """uint8 [B, F, H, W, 3] to [B, 3, F, H, W] in [-1, 1], where `like` lies and in its precision."""
    return rearrange(frames.to(like.device), "b f h w c -> b c f h w").to(like.dtype) / 127.5 - 1


def to_frames(video: Tensor) -> Tensor:
    """[B, 3, F, H, W] in [-1, 1] to uint8 [B, F, H, W, 3] on CPU."""
    frames = (video.float().clamp(-1, 1) + 1) * 127.5
    return rearrange(frames.round().to(torch.uint8), "b c f h w -> b f h w c").cpu()


def frozen(module: nn.Module) -> nn.Module:
    """Without gradients, in eval mode."""
    return module.requires_grad_(False).eval()


def load_transformer(
    kind: Any, path: str, revision: str | None, variant: str | None, dtype: torch.dtype, part: str = "transformer"
) -> nn.Module:
    """A folder's network, frozen. Raises ModelError where it lacks a weight, which diffusers would draw anew."""
    if Path(path).is_dir():
        check_weight_files(Path(path) / part, variant)
        variant = variant_of(Path(path) / part, variant)
    network, report = kind.from_pretrained(
        path, subfolder=part, revision=revision, variant=variant, torch_dtype=dtype, output_loading_info=True
    )
    missing = sorted(report["missing_keys"])
    if missing:
        more = f" (and {len(missing) - 1} more are missing)" if len(missing) > 1 else ""
        raise ModelError(f"model.path: {path}/{part}: holds no {missing[0]}{more}")
    return frozen(network)


def checked_path(model: Model) -> Model:
    """`model`, of which the scheduler alone is needed. Raises ModelError unless it leads from noise to clean latents:
    diffusers takes options with which it does not."""
    where = f"model.path: {model.path}/scheduler/{SCHEDULER_CONFIG_NAME}"
    try:
        walked = model.schedule(PATH_STEPS).coefficients
        trained, _ = model.training_path(torch.linspace(1, 0, 1000, dtype=torch.float64))
    except Exception as error:  # of numbers that are none diffusers, numpy and torch each raise their own kinds
        raise ModelError(f"{where}: cannot be walked: {_line(error)}") from error
    for rows in (walked, trained):
        noise = rows[:, 1]
        if not (rows.isfinite().all() and noise.min() >= 0 and noise.max() <= 1 + 1e-9 and noise.diff().max() <= 0):
            raise ModelError(f"{where}: its noise does not fall within [0, 1]: {noise[0]:g} … {noise[-1]:g}")
    if walked[-1, :2].tolist() != [1.0, 0.0] or walked[:, 1].diff().max() == 0:
        raise ModelError(f"{where}: its steps do not each lead to less noise, the last one to none")
    return model


def load_encoders(
    kind: type[DiffusionPipeline], path: str, revision: str | None, variant: str | None, **others: Any
) -> DiffusionPipeline:
    """A folder's pipeline with what makes latents and text, frozen, in fp32; `others` are its other parts."""
    if variant and Path(path).is_dir() and not _has_variant(Path(path), variant):
        variant = None  # which diffusers would refuse
    pipeline = kind.from_pretrained(path, revision=revision, variant=variant, **others)
    frozen(pipeline.vae.float()), frozen(pipeline.text_encoder.float())
    return pipeline


def _has_variant(folder: Path, variant: str) -> bool:
    return any(f".{variant}" in file.name for file in folder.glob("*/*"))


def settings_of(part: Any, path: str, subfolder: str, revision: str | None) -> dict[str, Any]:
    """A part's settings, the class's defaults for those that its config.json leaves out, without its weights."""
    with torch.device("meta"):
        return part.from_config(part.load_config(path, subfolder=subfolder, revision=revision)).config


@contextmanager
def loading(
    path: str,
    pipeline: type[DiffusionPipeline],
    revision: str | None,
    variant: str | None,
    expert: str | None,
    *,
    with_transformer: bool,
    with_encoders: bool,
) -> Iterator[dict[str, Any]]:
    """Turn whatever loading raises into a ModelError that names `path`; refuse a folder of another pipeline first, one
    that lacks a part, a hub model that cannot be had, and an `expert` that is none. Yields its model_index.json."""
    try:
        if not Path(path).is_dir():
            _check_hub(path, pipeline.config_name, revision)
        index = pipeline.load_config(path, revision=revision)
        if not isinstance(index, dict):
            raise ModelError(f"model.path: {path}/{pipeline.config_name}: no JSON object")
        if index.get("_class_name") != pipeline.__name__:
            raise ModelError(f"model.path: {path}: a {index.get('_class_name')}, not a {pipeline.__name__}")
        boundary_of(path, index, expert)
        if Path(path).is_dir():
            networks = (PARTS.values() if expert else ["transformer"]) if with_transformer else []
            _check_parts(Path(path), ["scheduler", "vae", *networks])
            if with_encoders:
                _check_encoders(Path(path), variant)
            if variant and not _has_variant(Path(path), variant):  # as what was exported of a network that has it
                say(f"model.variant: {variant}: no file of {path} is of it; the usual ones are loaded")
        yield index
    except AlignkitError:
        raise
    except Exception as error:  # diffusers, safetensors and json each raise their own kinds for damaged files
        raise ModelError(f"model.path: {path}: cannot load: {_line(error)}") from error


def _check_parts(folder: Path, parts: list[str]) -> None:
    """Raises ModelError for a part without a folder or settings, which diffusers would look for elsewhere."""
    for part in parts:
        if not (folder / part).is_dir():
            raise ModelError(f"model.path: {folder / part}: no such folder, so the model has no {part}")
        file = folder / part / SETTINGS.get(part, "config.json")
        if part == "tokenizer" and not file.exists():
            continue  # some have other files alone
        try:
            told = json.loads(file.read_text())
        except (OSError, ValueError) as error:
            raise ModelError(f"model.path: {file}: cannot load: {error}") from error
        if not isinstance(told, dict):
            raise ModelError(f"model.path: {file}: cannot load: no JSON object")


def _check_encoders(folder: Path, variant: str | None) -> None:
    """The same of what makes latents and text, with their weights; diffusers loads these from *.bin too."""
    _check_parts(folder, ["vae", "text_encoder", "tokenizer"])
    for part in ("vae", "text_encoder"):
        if not any((folder / part).glob("*.bin")):
            check_weight_files(folder / part, variant)


def _check_hub(name: str, file: str, revision: str | None) -> None:
    """Whether a hub model can be had at all: without this each of its files is asked for again and again."""
    if isinstance(try_to_load_from_cache(name, file, revision=revision), str):
        return
    try:  # downloading asks six times, waiting longer each time
        get_hf_file_metadata(hf_hub_url(name, file, revision=revision), timeout=HUB_TIMEOUT_S)
    except (HFValidationError, RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise ModelError(f"model.path: {name}: no such folder, nor such a model on the hub: {_line(error)}") from error
    except EntryNotFoundError as error:
        raise ModelError(f"model.path: {name}: a hub model without {file}, so no diffusers pipeline") from error
    except Exception as error:  # the hub's client and its client for HTTP each raise their own kinds
        raise ModelError(
            f"model.path: {name}: not in this machine's cache, and the hub cannot be reached ({_line(error)}); where "
            f"it can: hf download {name} --local-dir FOLDER, then set model.path=FOLDER here"
        ) from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
