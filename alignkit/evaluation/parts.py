"""What `alignkit eval` computes with networks and VAE, part by part, each a file in output.dir/measured.

Any number of processes share the parts between them, and each has the same bits whoever makes it. What is concluded
from them is `alignkit.evaluation.summary`'s.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from alignkit import __version__
from alignkit.apo.inversions import versions
from alignkit.config import Config
from alignkit.config.sections import HANDLING
from alignkit.errors import DataError
from alignkit.evaluation.measures import edge_energy, motion_amount, temporal_flicker
from alignkit.evaluation.pairs import PairScores, joined, score_point
from alignkit.evaluation.readiness import CLIPS, explained_share
from alignkit.evaluation.regions import again, shown_pairs
from alignkit.evaluation.samples import MODELS
from alignkit.evaluation.shared import model_terms, share_out_shown
from alignkit.files import write_atomically
from alignkit.localdpo.build import Guided, guided_text
from alignkit.media.videos import decode_clip
from alignkit.models import VideoModel, load_model, working_dtype
from alignkit.sharing import shared_folder
from alignkit.stores.folders import check_size, pairs_folder, source_folder, video_spec
from alignkit.stores.pairs import Pair, PairStore
from alignkit.training.export import aligned_section
from alignkit.training.heldout import Point, points

MEASURES = {"motion": motion_amount, "flicker": temporal_flicker, "edge_energy": edge_energy}
SCORED = {"before": "base", "after": "aligned"}
ENCODERS = "encoders"
Tensors = dict[str, Tensor]


class Parts:
    """Of one evaluation. Models are loaded when a part needs them; networks never lie beside encoders."""

    def __init__(self, config: Config, device: torch.device):
        self.config, self.device = config, device
        self.folder = config.output.dir / "measured"
        self.store = PairStore(pairs_folder(config, "heldout"))
        self.sections = {"base": config.model, "aligned": aligned_section(config)}
        self.shown = [] if config.few_step_sampler else shown_pairs(self.store)  # regions are redone in many steps
        self.sampled = self.store.info.kind == "rollouts"  # both sides: there are no files of real videos
        self._outline = load_model(config.model, with_transformer=False, with_encoders=False)
        check_size(config, self._outline, self.store)
        self._points = points(config, self._outline, self.store)
        files = self.store.rows["source"]  # a video may have several pairs
        self._clips = list(range(len(self.store))) if self.sampled else list(dict.fromkeys(files))
        self._loaded: dict[str, VideoModel] = {}
        for file in () if self.sampled else [source_folder(config) / str(name) for name in self._clips]:
            if not file.exists():
                raise DataError(f"{file}: no such file; samples are compared with the held-out videos, put it back")

    def held(self) -> AbstractContextManager[None]:
        """The right to make the parts, and to read them; those of other models, pairs or settings are deleted."""
        config = self.config
        steps = config.sample.num_inference_steps
        terms = {
            **{f"{name} model": model_terms(section, steps) for name, section in self.sections.items()},
            "pairs": self.store.fingerprint,
            "regions": config.pairs.model_dump(mode="json", exclude=HANDLING | {"block_size"}),
            "evaluation": config.evaluation.model_dump(mode="json"),
            "beta": config.objective.largest_beta,
            "videos": config.data.model_dump(mode="json", include={"height", "width", "num_frames", "fps"}),
            "device": [self.device.type, str(working_dtype(config.model, self.device))],
            "versions": versions() | {"alignkit": __version__},
        }
        return shared_folder(self.folder, terms, "eval", r"\.?[a-z]+-\d{5}\.(safetensors.*|lock)")

    def make(self, show: bool) -> None:
        """Have every part made, whichever process makes it."""
        clips = {_part("clips", i): partial(self._rebuilt, batch) for i, batch in enumerate(self._batches())}
        texts = {_part("text", i): partial(self._text, pair) for i, pair in enumerate(self.shown)}
        self._share("real clips through the VAE", clips | texts, show)
        scores = {
            _part(when, i): partial(self._scored, name, point)
            for when, name in SCORED.items()
            for i, point in enumerate(self._points)
        }
        self._share("scoring held-out pairs", scores | {_part("explained"): self._explained}, show)
        redrawn = {_part(name, i): partial(self._redrawn, name, i) for name in MODELS for i in range(len(self.shown))}
        self._share("regenerating held-out regions", redrawn, show)
        self._loaded.clear()

    def frames(self) -> Tensor:
        """Of the held-out clips, or of the winners where both sides were sampled, uint8 [count, F, H, W, 3]."""
        batches = enumerate(self._batches())
        return torch.cat([self._read("clips", i)["frames"] if self.sampled else self._decoded(it) for i, it in batches])

    def rebuilt(self) -> dict[str, float]:
        """MEASURES of the clips encoded and decoded: the best that any samples of this model can look like."""
        found = [self._read("clips", i) for i in range(len(self._batches()))]
        return {name: torch.cat([part[name] for part in found]).mean().item() for name in MEASURES}

    def scores(self, when: str) -> PairScores:
        """Of one of SCORED."""
        found = [self._read(when, i) for i in range(len(self._points))]
        return joined(self.config, self._outline, self.store, found)

    def explained(self) -> float:
        """`explained_share` of the base."""
        return self._read("explained")["share"].item()

    def redrawn(self) -> dict[str, list[Tensor]]:
        """Latents of the regions that are shown, by model."""
        return {name: [self._read(name, i)["latents"] for i in range(len(self.shown))] for name in MODELS}

    def _batches(self) -> list[list[Any]]:
        size = self.config.evaluation.batch_size
        return [self._clips[first : first + size] for first in range(0, len(self._clips), size)]

    def _share(self, title: str, parts: Mapping[Path, Callable[[], Tensors]], show: bool) -> None:
        files, makers = [self.folder / name for name in parts], list(parts.values())

        def make(number: int) -> None:
            made = {name: tensor.contiguous().cpu() for name, tensor in makers[number]().items()}
            write_atomically(files[number], save_tensors(made))

        share_out_shown(files, make, title, show=show)

    def _read(self, kind: str, number: int = 0) -> Tensors:
        return load_tensors((self.folder / _part(kind, number)).read_bytes())

    def _model(self, name: str) -> VideoModel:
        """ENCODERS, or the network of "base" or "aligned"."""
        encoders = name == ENCODERS
        if name not in self._loaded:
            if encoders or ENCODERS in self._loaded:
                self._loaded.clear()
            self._loaded[name] = load_model(
                self.sections["base" if encoders else name],
                with_transformer=not encoders,
                with_encoders=encoders,
                device=self.device,
                dtype=working_dtype(self.config.model, self.device),
            )
        return self._loaded[name]

    def _decoded(self, clips: list[Any]) -> Tensor:
        if self.sampled:
            winners = (self.store[row].winner[None].to(self.device) for row in clips)
            return torch.cat([self._model(ENCODERS).decode_video(winner) for winner in winners])
        folder, spec = source_folder(self.config), video_spec(self.config)
        return torch.stack([decode_clip(folder / name, spec) for name in clips])

    def _rebuilt(self, clips: list[Any]) -> Tensors:
        model, frames = self._model(ENCODERS), self._decoded(clips)
        rebuilt = model.decode_video(model.encode_video(frames))
        kept = {"frames": frames} if self.sampled else {}
        return {name: measure(rebuilt) for name, measure in MEASURES.items()} | kept

    def _text(self, pair: Pair) -> Tensors:
        return guided_text(self.config, self._model(ENCODERS), [pair.prompt], self.device)._asdict()

    def _scored(self, name: str, point: Point) -> Tensors:
        base, network = self._model("base"), self._model(name).transformer
        return score_point(self.config, base, self.store, network, base.transformer, point, self.device)

    def _explained(self) -> Tensors:
        base = self._model("base")
        first = [self.store[row] for row in range(min(CLIPS, len(self.store)))]
        text = base.pad_text([pair.text for pair in first]).to(self.device, base.dtype)
        share = explained_share(base, torch.stack([pair.winner for pair in first]), text)
        return {"share": torch.tensor(share, dtype=torch.float64)}

    def _redrawn(self, name: str, number: int) -> Tensors:
        text = Guided(**{key: value.to(self.device) for key, value in self._read("text", number).items()})
        return {"latents": again(self.config, self._model(name), [self.shown[number]], text, self.device)[0]}


def _part(kind: str, number: int = 0) -> Path:
    return Path(f"{kind}-{number:05d}.safetensors")
