"""Train what looks at the drawn clips: ``python -m alignkit.tiny.critics --help``.

Two fault detectors and a second classifier. The judge says how good samples are; the ranker orders samples to train
on. They share no clip, no seed and no width, and the ranker never sees one kind of fault, so that what a model learns
from the ranker is judged by another. (The judge's classifier is a stage of `alignkit.tiny.pretrain`.) Both VAEs'
shipped weights are needed: samples come through them. Stages resume as those of the models do.
"""

import argparse
import json
import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from alignkit.errors import DataError
from alignkit.media.rows import read_table
from alignkit.media.videos import read_video
from alignkit.models import shipped_model
from alignkit.tiny import classifier, detector
from alignkit.tiny.classifier_training import disturbed, train_classifier
from alignkit.tiny.clips import render_clip
from alignkit.tiny.detector import CELL, FaultDetector, clip_logit
from alignkit.tiny.faults import KINDS, FaultyClip, faulty_clip
from alignkit.tiny.muon import Muon
from alignkit.tiny.recipes import FAMILIES, recipe_of
from alignkit.tiny.stages import Ema, RunningLog, log, schedule, step_rng, torch_generator, train_steps
from alignkit.tiny.vae import decode_latents, encode_clips, to_unit

STAGE = 5
BATCH = 32
FAULTY_CELL = 0.1  # share of a cell's pixels from which on it counts
WITHHELD = "torn"  # never shown to the ranker


@dataclass(frozen=True)
class Training:
    """seed: of the clips and of the network. rebuilt: how many of the clips also come through each VAE."""

    seed: int
    kinds: tuple[str, ...]
    clips: int = 2048
    rebuilt: int = 768
    steps: int = 600  # it names 998 of 1000 training clips after 300
    peak_rate: float = 0.02


ROLES = {
    "judge": Training(3001, tuple(KINDS), steps=900),
    "ranker": Training(3002, tuple(kind for kind in KINDS if kind != WITHHELD)),
}
HELD_OUT_SEED = 3900
"""Clips that neither has seen."""


def make_clips(training: Training, seed: int, count: int) -> list[FaultyClip]:
    """Clips of a seed, half of them with faults."""
    return [faulty_clip(seed, index, fault_share=0.5, kinds=training.kinds) for index in range(count)]


def through_vae(family: str, frames: np.ndarray, seed: int, most: float = 0.2) -> np.ndarray:
    """uint8 clips after a family's VAE, with noise of up to ``most`` of the latents' deviation added.

    Generated latents are not exact either.
    """
    vae = type(recipe_of(family).new_vae()).from_pretrained(shipped_model(family), subfolder="vae").eval()
    latents = encode_clips(vae, frames)
    generator = torch.Generator().manual_seed(seed)
    amount = (
        most * torch.rand(len(latents), 1, 1, 1, 1, generator=generator) * latents.std(dim=(0, 2, 3, 4), keepdim=True)
    )
    return decode_latents(vae, latents + amount * torch.randn(latents.shape, generator=generator))


def faulty_cells(where: Tensor) -> Tensor:
    """bool [B, F, H, W] by pixel to float32 [B, 5, 12, 12] by cell: 1 where enough of its pixels are faulty.

    The pixels of cell t are those of frames 4·t − 2 … 4·t + 1.
    """
    padded = F.pad(where.float(), (0, 0, 0, 0, CELL // 2, 1))
    share = F.avg_pool3d(padded[:, None], CELL)[:, 0]
    return (share >= FAULTY_CELL).float()


def train_detector(
    clips: np.ndarray, rows: Tensor, cells: Tensor, folder: Path, training: Training, width: int
) -> FaultDetector:
    """Train on uint8 clips [N, F, H, W, 3], of which clip i shows the faults ``cells[rows[i]]``, [M, 5, 12, 12]."""
    torch.manual_seed(training.seed)
    model = FaultDetector(width)
    layers = [module for module in model.modules() if isinstance(module, torch.nn.Conv3d)]
    matrices = [layer.weight for layer in layers[1:-1]]
    others = [p for p in model.parameters() if all(p is not q for q in matrices)]
    optimizer = Muon(matrices, others, matrix_rate=training.peak_rate, other_rate=0.1 * training.peak_rate)
    ema = Ema(model, 0.99)
    running = RunningLog("detector", training.steps)
    for step in train_steps("detector", folder, model, optimizer, ema, training.steps):
        rng = step_rng(training.seed, STAGE, step)
        chosen = rng.integers(len(clips), size=BATCH)
        wanted = cells[rows[chosen]]
        faulty = wanted.flatten(1).amax(1)
        optimizer.scale_rates(schedule(step, training.steps))
        logits = model(disturbed(to_unit(clips[chosen]), torch_generator(rng)))
        clip = clip_logit(logits)
        by_cell = F.binary_cross_entropy_with_logits(logits, wanted)
        by_clip = F.binary_cross_entropy_with_logits(clip, faulty)
        optimizer.zero_grad()
        (10 * by_cell + by_clip).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        right = ((clip > 0) == (faulty > 0)).float().mean().item()
        running.add(step, cells=by_cell.item(), clip=by_clip.item(), right=right)
    model.load_state_dict(ema.values)
    return model.eval()


def train(role: classifier.Role, work: Path, out: Path) -> None:
    """Train the role's networks into ``out``; a finished one is passed over."""
    training = ROLES[role]
    work.mkdir(parents=True, exist_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    made = make_clips(training, training.seed, training.clips)
    frames = np.stack([clip.frames for clip in made])
    rebuilt = [_kept(work / f"{family}.npy", family, frames[: training.rebuilt], training.seed) for family in FAMILIES]
    where = torch.from_numpy(np.stack([clip.where for clip in made]))
    rows = torch.cat([torch.arange(len(frames)), *(torch.arange(len(part)) for part in rebuilt)])
    everything = np.concatenate([frames, *rebuilt])
    file = out / detector.FILES[role].name
    if not file.exists():
        model: nn.Module = train_detector(everything, rows, faulty_cells(where), work, training, detector.WIDTHS[role])
        save_file(model.state_dict(), file)
    file = out / classifier.FILES[role].name
    if role == "ranker" and not file.exists():
        model = train_classifier(
            frames,
            np.concatenate(rebuilt),
            [clip.attributes for clip in made],
            work,
            steps=training.steps,
            peak_rate=training.peak_rate,
            seed=training.seed,
            width=classifier.WIDTHS[role],
            vaes=len(FAMILIES),
        )
        save_file(model.state_dict(), file)


def _kept(file: Path, family: str, frames: np.ndarray, seed: int) -> np.ndarray:
    if not file.exists():
        log.info("%d clips through the VAE of %s", len(frames), family)
        np.save(file, through_vae(family, frames, seed))
    return np.load(file)


def rates(role: classifier.Role, count: int = 400) -> dict[str, float]:
    """What the shipped networks of a role get right on clips that nobody has seen, half of them through each VAE.

    ``false_alarms``: share of clean clips that are called faulty; by kind: share of clips with that fault that are.
    """
    clean = np.stack([render_clip(HELD_OUT_SEED, index).frames for index in range(count)])
    attributes = [render_clip(HELD_OUT_SEED, index).attributes for index in range(count)]
    rebuilt = np.concatenate(
        [through_vae(family, part, HELD_OUT_SEED) for family, part in zip(FAMILIES, np.split(clean, 2), strict=True)]
    )
    named = classifier.classify(rebuilt, role)
    right = [all(named[name][i] == entry[name] for name in classifier.NAMED) for i, entry in enumerate(attributes)]
    shares = {
        "false_alarms": float((detector.fault_scores(clean, role) > 0.5).mean()),
        "false_alarms_after_vae": float((detector.fault_scores(rebuilt, role) > 0.5).mean()),
        "named_right_after_vae": float(np.mean(right)),
    }
    for kind in KINDS:
        faulty = np.stack([faulty_clip(HELD_OUT_SEED + 1, i, kinds=(kind,)).frames for i in range(count // 4)])
        halves = zip(FAMILIES, np.split(faulty, 2), strict=True)
        rebuilt = np.concatenate([through_vae(family, part, HELD_OUT_SEED) for family, part in halves])
        shares[f"{kind}_hit"] = float((detector.fault_scores(faulty, role) > 0.5).mean())
        shares[f"{kind}_hit_after_vae"] = float((detector.fault_scores(rebuilt, role) > 0.5).mean())
    return shares


def labelled_rates(folder: Path, role: classifier.Role) -> dict[str, float]:
    """The same of samples that a person has labelled: FOLDER/labels.jsonl with video, prompt, fault and followed.

    Raises DataError for a file or a row of another kind.
    """
    file = folder / "labels.jsonl"
    rows = [_labelled(file, line, row) for line, row in read_table(file, "labels", (".jsonl",)).rows]
    frames = np.stack([read_video(folder / row["video"]).numpy() for row in rows])
    fault, followed = (np.array([row[name] for row in rows]) for name in ("fault", "followed"))
    named = classifier.classify(frames, role)
    right = np.array(
        [all(named[key][i] == row["wanted"][key] for key in classifier.NAMED) for i, row in enumerate(rows)]
    )
    seen = detector.fault_scores(frames, role) > detector.FAULTY
    return {
        "labelled": len(rows),
        "labelled_faulty": float(fault.mean()),
        "labelled_faulty_seen": float(seen.mean()),
        "labelled_hit": float(seen[fault].mean()),
        "labelled_false_alarms": float(seen[~fault].mean()),
        "labelled_followed": float(followed.mean()),
        "labelled_followed_seen": float(right.mean()),
        "labelled_followed_agree": float((right == followed).mean()),
    }


def _labelled(file: Path, line: int, row: dict[str, Any] | str) -> dict[str, Any]:
    """A row, with what its prompt names."""
    if isinstance(row, str):
        raise DataError(f"{file}: line {line}: {row}")
    for name, kind in (("video", str), ("prompt", str), ("fault", bool), ("followed", bool)):
        if not isinstance(row.get(name), kind):
            raise DataError(f"{file}: line {line}: {name} should be {'a text' if kind is str else 'true or false'}")
    wanted = classifier.attributes_in(row["prompt"])
    if wanted is None:
        raise DataError(f"{file}: line {line}: no drawn clip has the prompt {row['prompt']!r}")
    return row | {"wanted": wanted}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m alignkit.tiny.critics", description=__doc__)
    parser.add_argument("--role", choices=tuple(ROLES), required=True)
    parser.add_argument("--work", type=Path, help="checkpoints; with it the networks are trained")
    parser.add_argument("--out", type=Path, help="where the weights go, beside --work")
    parser.add_argument("--labels", type=Path, help="folder of samples that a person has labelled: their rates too")
    given = parser.parse_args(arguments)
    if (given.work is None) != (given.out is None):
        parser.error("--work and --out go together; without them the shipped networks' rates are printed")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if given.work:
        train(given.role, given.work, given.out)
    else:
        try:
            labelled = labelled_rates(given.labels, given.role) if given.labels else {}
        except DataError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        found = rates(given.role) | labelled
        print(json.dumps({name: round(value, 3) for name, value in found.items()}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
