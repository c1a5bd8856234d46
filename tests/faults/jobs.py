"""What is broken: small jobs of every stage of the command line, and what of each must come out the same."""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "wan-tiny-localdpo.yaml"
KEPT = 2
CHECKPOINTS = "checkpoints"
SIZES = (
    "data.height=32", "data.width=32", "data.num_frames=9", "pairs.num_inference_steps=4", "pairs.strengths=[3]",
    "pairs.block_size=2", "pairs.batch_size=2", "pairs.previews=2", "pairs.mask={}", "objective={beta: 50}",
    "train.steps=6", "train.global_batch_size=4", "train.micro_batch_size=2", "train.checkpoint_every=2",
    f"train.keep_checkpoints={KEPT}", "train.learning_rate=1e-4", "data.heldout=0.4",
)  # fmt: skip
PROMPTS = (
    "a red circle moves left on a plain background",
    "a blue square moves up on a striped background",
    "a green triangle moves right on a plain background",
)
ROLLOUTS = (
    "rollout.num_inference_steps=4", "rollout.solver=first_order", "rollout.per_prompt=3", "rollout.batch_size=2",
    "rollout.block_size=2", "rollout.previews=0", "noise.source=path", "noise.path_steps=2", "noise.timesteps=schedule",
    "objective.name=dpo",
)  # fmt: skip
SAMPLES = ("sample.num_inference_steps=2", "sample.count=4", "sample.seeds=[0,1]", "sample.batch_size=2")
RANKED = ("ranker.by=motion", "ranker.min_margin=0")
OWN = ("rollout={num_inference_steps: 2, per_prompt: 2, block_size: 2, previews: 0}", "sample.num_inference_steps=4")
FEW_STEPS = ("student.num_inference_steps=2", "sample.guidance_scale=2.0")
HAND_OVER = "stages=[{name: sft, train: {steps: 3}}, {name: localdpo, train: {steps: 2}}]"
ROUNDS = "stages=[{name: online, online: {every: 2, prompts: 2}, train: {steps: 4}}]"
STUDENT = (
    "stages=[{name: distill, train: {steps: 4}}, "
    "{name: drift_correction, student: {ratio: 2}, online: {every: 4}, train: {steps: 4}}]"
)


@dataclass(frozen=True)
class Job:
    """command and settings: of the command line. start: jobs whose results it starts from. result: what must come out
    the same, by name, of the run's folder."""

    name: str
    command: tuple[str, ...]
    settings: tuple[str, ...]
    result: Callable[[Path], dict[str, object]]
    start: tuple[str, ...] = ()
    prompts: bool = False  # instead of videos
    processes: int = 1

    def words(self, run: Path, world: Path, *changed: str) -> list[str]:
        """The command line of the job in the folder `run`."""
        places = {"output.dir": run, "model.path": world / "base"}
        places |= {"data.prompts": world / "prompts.txt"} if self.prompts else {"data.videos": world / "clips"}
        named = [f"{key}={place}" for key, place in places.items()]
        several = ["--nproc", str(self.processes)] if self.processes > 1 else []
        return [*self.command, str(CONFIG), *SIZES, *named, *self.settings, *changed, *several]


def prepare(world: Path) -> None:
    """What all jobs read: a small base, clips and prompts."""
    from halved import halve

    from alignkit.tiny.clips import write_clips

    halve("wan", world / "base")
    write_clips(world / "clips", 10, seed=99)
    (world / "prompts.txt").write_text("\n".join(PROMPTS))


def begin(job: Job, run: Path, world: Path) -> None:
    """A fresh folder for a run of `job`, with what it starts from."""
    shutil.rmtree(run, ignore_errors=True)
    run.mkdir(parents=True)
    for name in job.start:
        for part in sorted((world / "whole" / name).iterdir()):
            if part.is_dir() and part.name in ("pairs", "rollouts", "rankings", "reference", "export", "samples"):
                shutil.copytree(part, run / part.name, dirs_exist_ok=True)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _rows(folder: Path) -> dict[str, object]:
    """Every row of the stores in `folder`, by its digest, in order."""
    import datasets

    found: dict[str, object] = {}
    for file in sorted(folder.rglob("block-*.arrow")):
        rows = datasets.Dataset.from_file(str(file))
        names = [name for name in rows.column_names if name not in ("digest",)]
        content = json.dumps([rows[i] for i in range(len(rows))], default=lambda value: _digest(bytes(value)))
        found[str(file.relative_to(folder))] = [len(rows), names, _digest(content.encode())]
    return found


def _pairs(run: Path) -> dict[str, object]:
    previews = sorted((run / "pairs").glob("*/previews/*.png"))
    return _rows(run / "pairs") | {str(file.relative_to(run)): _digest(file.read_bytes()) for file in previews}


def _rollouts(run: Path) -> dict[str, object]:
    return _rows(run / "rollouts")


def _cache(run: Path) -> dict[str, object]:
    return _rows(run / "reference")


def _ranking(run: Path) -> dict[str, object]:
    folder = run / "rankings"
    answers = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    given = sorted((row["of"], row["who"], row["p"]) for row in answers)
    return {"ranking": (folder / "ranking.jsonl").read_text(), "answers": given}


def _samples(run: Path) -> dict[str, object]:
    files = sorted((run / "samples").rglob("*.mp4"))
    videos = {str(file.relative_to(run)): _digest(file.read_bytes()) for file in files}
    return videos | {"list": (run / "samples" / "samples.jsonl").read_text()}


def _measured(run: Path) -> dict[str, object]:
    parts = {file.name: _digest(file.read_bytes()) for file in sorted((run / "measured").glob("*.safetensors"))}
    maps = _digest((run / "samples" / "maps.npz").read_bytes())
    summary = json.loads((run / "summary.json").read_text())
    costs = ("seconds", "peak_memory_gb")
    return parts | {"maps": maps, **{name: value for name, value in summary.items() if name not in costs}}


def _trained(run: Path) -> dict[str, object]:
    """Curves, weights that were handed on or exported, the rounds' pairs, and the checkpoints that are kept."""
    found: dict[str, object] = {}
    for pattern in ("**/metrics.jsonl", "**/masters.safetensors", "export/transformer/*.safetensors"):
        for file in sorted(run.glob(pattern)):
            found[str(file.relative_to(run))] = _digest(file.read_bytes())
    for file in sorted(run.glob("stages/*/rounds/*/**/ranking.jsonl")):
        found[str(file.relative_to(run))] = file.read_text()
    for folder in sorted(run.glob("stages/*/rounds/*/pairs/train")):
        found[str(folder.relative_to(run))] = _rows(folder)
    for folder in sorted(run.glob(f"**/{CHECKPOINTS}")):
        # the oldest one of a run that was killed after its last save, before it was removed, is left
        found[str(folder.relative_to(run))] = [path.name for path in sorted(folder.glob("step-*"))][-KEPT:]
    assert any(name.startswith("export/") for name in found), "nothing is exported"
    return found


def saved_too(result: dict[str, object], step: int) -> dict[str, object]:
    """`result`, of a training in one folder, as it is where a step more was saved on the way."""
    (name,) = (name for name in result if name.endswith(CHECKPOINTS))
    kept = result[name]
    assert isinstance(kept, list)
    return result | {name: sorted({*kept, f"step-{step:08d}"})[-KEPT:]}


JOBS = {
    job.name: job
    for job in (
        Job("pairs", ("pairs",), (), _pairs),
        Job("train", ("train",), (), _trained, ("pairs",)),
        Job("train on two", ("train",), (), _trained, ("pairs",), processes=2),
        Job("cache", ("cache-reference",), (), _cache, ("pairs",)),
        Job("cached", ("train",), ("reference.strategy=cached",), _trained, ("pairs", "cache")),
        Job("samples", ("sample",), SAMPLES, _samples, ("pairs", "train")),
        Job("measured", ("eval",), SAMPLES, _measured, ("pairs", "train", "samples")),
        Job("rollouts", ("rollout",), ROLLOUTS, _rollouts, prompts=True),
        Job("ranking", ("rank", "run"), (*ROLLOUTS, *RANKED), _ranking, ("rollouts",), prompts=True),
        Job("hand-over", ("train",), (HAND_OVER,), _trained, ("pairs",)),
        Job("rounds", ("train",), (*OWN, *RANKED, ROUNDS), _trained, prompts=True),
        Job("student", ("train",), (*OWN, *FEW_STEPS, STUDENT), _trained, prompts=True),
    )
}
