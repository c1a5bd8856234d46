"""Every preset × dtype × weights × reference × processes × family through three steps, a save, a resume and an export.

    python tests/training/matrix.py              all of them: half an hour on two cores
    python tests/training/matrix.py zero2 ema    those that have all of these words

Each combination runs unbroken, and a copy of it goes on from what it had saved after two steps; both must end in the
same metrics and the same export, which must be finite and not the base. What is found before a stop is kept in
out/matrix.json; a combination that cannot work must be refused by a sentence, which is in the table. Exits with 1
otherwise.
"""

import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))
KNOWN = ROOT / "out" / "matrix.json"
STEPS = 3


class Row(NamedTuple):
    family: str
    preset: str
    dtype: str
    weights: str
    reference: str
    processes: str


AXES = {
    "family": ("wan", "cogvideox"),
    "preset": ("zero2", "zero3", "zero3-offload"),
    "dtype": ("fp32", "bf16"),
    "weights": ("full", "lora", "merged"),
    "reference": ("copy", "adapter", "cached", "ema"),
    "processes": ("1", "2"),
}
SIZES = (
    "data.height=32", "data.width=32", "data.num_frames=9", "pairs.num_inference_steps=4", "pairs.strengths=[3]",
    "pairs.block_size=4", "pairs.batch_size=4", "objective={beta: 50}", "pairs.mask={}", "train.learning_rate=1e-4",
    "train.global_batch_size=4", "train.micro_batch_size=2", "train.checkpoint_every=2", "train.keep_checkpoints=2",
    "train.checkpointing=full", f"train.steps={STEPS}",
)  # fmt: skip


def combinations() -> list[Row]:
    return [Row(*values) for values in itertools.product(*AXES.values())]


def impossible(row: Row) -> str | None:
    """Why a combination cannot work, in words of the sentence that refuses it."""
    if row.reference == "adapter" and row.weights != "lora":
        return "'adapter' needs train.lora"
    return None


def cover(rows: list[Row]) -> list[Row]:
    """Some of `rows` in which each pair of values that any of them has occurs: greedy, the same at every call."""

    def pairs(row: Row) -> set:
        return set(itertools.combinations(enumerate(row), 2))

    left, chosen = set().union(*map(pairs, rows)), []
    while left:
        best = max(rows, key=lambda row: len(pairs(row) & left))
        chosen.append(best)
        left -= pairs(best)
    return chosen


def settings_of(row: Row, base: Path, out: Path) -> list[str]:
    """base: the folder that `prepare` filled for the family."""
    more = {"full": [], "lora": ["train.lora={rank: 4, alpha: 8}"], "merged": [f"model.lora=[{base / 'adapters'}]"]}
    reference = {"ema": "reference={strategy: ema, every: 1, decay: 0.5}"}
    return [
        *SIZES, f"model.path={base / 'model'}", f"data.videos={base / 'clips'}",
        f"pairs.folder={base / 'pairs'}", f"output.dir={out}",
        f"model.dtype={row.dtype}", f"deepspeed.preset={row.preset}", *more[row.weights],
        reference.get(row.reference, f"reference.strategy={row.reference}"),
    ]  # fmt: skip


def prepare(family: str, base: Path) -> None:
    """A small model of the family, clips, pairs and adapters in the folder `base`."""
    import torch
    from halved import halve

    from alignkit.config import LoraSection, load_config
    from alignkit.files import write_json
    from alignkit.localdpo.build import build_pairs
    from alignkit.models import load_model
    from alignkit.tiny.clips import write_clips
    from alignkit.training.export import export_lora
    from alignkit.training.lora import add_lora

    write_clips(base / "clips", 6, seed=99)
    model = halve(family, base / "model")
    config = load_config(
        config_of(family), [*SIZES, f"model.path={model}", f"data.videos={base / 'clips'}", f"output.dir={base}"]
    )
    build_pairs(config, torch.device("cpu"), show=False)
    for file in base.glob("pairs/*/pairs.json"):  # pairs that no network made suit the merged base as well
        write_json(file, json.loads(file.read_text()) | {"model": None})
    lora = LoraSection(rank=4, alpha=8)
    model = load_model(config.model, with_encoders=False)
    values, generator = add_lora(model.transformer, lora, seed=7), torch.Generator().manual_seed(7)
    moved = {name: value + 0.02 * torch.rand(value.shape, generator=generator) for name, value in values.items()}
    export_lora(model, moved, lora, base / "adapters")


def config_of(family: str) -> Path:
    return ROOT / "configs" / f"{family}-tiny-localdpo.yaml"


def train_together(file: Path, settings: list[str], processes: int) -> None:
    """Train to the last step in new processes; with reference.strategy=cached, its errors first.

    Forked from this one, which has imported everything. Raises RuntimeError with what the first one that failed said.
    """
    from alignkit.launch import free_port

    with tempfile.TemporaryDirectory() as folder:
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        children = {}
        for rank in range(processes):
            child = os.fork()
            if not child:
                numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
                os.environ.update(address, **{name: str(number) for name, number in numbers.items()})
                os._exit(_train(file, settings, Path(folder) / str(rank)))
            children[child] = Path(folder) / str(rank)
        problem = None
        while children:
            child, status = os.wait()
            said = children.pop(child)
            if status and problem is None:
                problem = said.read_text() if said.exists() else f"status {status}"
                for other in children:  # it would wait for this one
                    os.kill(other, 9)
        if problem:
            raise RuntimeError(problem)


def _train(file: Path, settings: list[str], said: Path) -> int:
    import torch

    from alignkit.config import load_config
    from alignkit.errors import AlignkitError
    from alignkit.training.cache import build_cache
    from alignkit.training.distributed import start_process
    from alignkit.training.loop import train

    try:
        config = load_config(file, settings)
        process = start_process()
        if config.reference.strategy == "cached":
            build_cache(config, process)
        train(config, process)
        torch.distributed.destroy_process_group()
        return 0
    except AlignkitError as error:
        said.write_text(f"refused: {error}")
    except BaseException:
        said.write_text(traceback.format_exc())
    return 1


def run(row: Row, base: Path, folder: Path) -> str:
    """ "trained", or the sentence that refuses the combination; AssertionError or RuntimeError otherwise.

    base: what `prepare` made. folder: for the runs, afterwards empty.
    """
    import torch
    from safetensors.torch import load_file

    whole, broken = folder / "whole", folder / "broken"
    try:
        train_together(config_of(row.family), settings_of(row, base, whole), int(row.processes))
        shutil.copytree(whole, broken)
        shutil.rmtree(broken / "train" / "checkpoints" / f"step-{STEPS:08d}")
        shutil.rmtree(broken / "export")
        train_together(config_of(row.family), settings_of(row, base, broken), int(row.processes))
    except RuntimeError as error:
        if str(error).startswith("refused: "):
            return str(error).removeprefix("refused: ")
        raise
    metrics = [(out / "train" / "metrics.jsonl").read_text() for out in (whole, broken)]
    assert metrics[0] == metrics[1], "broken and resumed, it has other metrics"
    lines = [json.loads(line) for line in metrics[0].splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3] and not any(line["skipped"] for line in lines)
    assert lines[0]["rewards/margins"] == 0.0, "policy and reference are one before the first step"
    part = "." if row.weights == "lora" else "transformer"
    first, second = (load_file(next((out / "export" / part).glob("*.safetensors"))) for out in (whole, broken))
    for name, value in first.items():
        assert value.isfinite().all() and torch.equal(value, second[name]), name
    start = {name: torch.zeros(()) for name in first if "lora_B" in name}
    if row.weights != "lora":
        start = load_file(next(base.glob("model/transformer/*.safetensors")))
    assert any((first[name] != value).any() for name, value in start.items()), "the export is the base"
    shutil.rmtree(folder)
    return "trained"


def table(found: dict[str, str]) -> str:
    """Markdown: family, preset and dtype down, weights and processes across, references in each field."""
    across = [(weights, processes) for weights in AXES["weights"] for processes in AXES["processes"]]
    lines = ["| | " + " | ".join(f"{weights}, {count}" for weights, count in across) + " |"]
    lines.append("| --- |" + " --- |" * len(across))
    for down in itertools.product(AXES["family"], AXES["preset"], AXES["dtype"]):
        fields = []
        for weights, count in across:
            rows = [Row(*down, weights, reference, count) for reference in AXES["reference"]]
            fields.append(", ".join(row.reference for row in rows if found.get(" ".join(row)) == "trained") or "–")
        lines.append(f"| {' '.join(down)} | " + " | ".join(fields) + " |")
    return "\n".join(lines)


def main() -> int:
    words = set(sys.argv[1:])
    rows = [row for row in combinations() if words <= set(row)]
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD:alignkit"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    known = json.loads(KNOWN.read_text()) if KNOWN.exists() else {}
    if known.get("of") != commit.stdout:
        known = {"of": commit.stdout, "found": {}}
    failed = 0
    with tempfile.TemporaryDirectory() as scratch:
        for family in AXES["family"]:
            prepare(family, Path(scratch, family))
        for row in rows:
            name = " ".join(row)
            if name not in known["found"]:
                try:
                    known["found"][name] = run(row, Path(scratch, row.family), Path(scratch, "run"))
                except (AssertionError, RuntimeError) as error:
                    shutil.rmtree(Path(scratch, "run"), ignore_errors=True)
                    print(f"{name}: FAILED: {error}", flush=True)
                    failed += 1
                    continue
                KNOWN.parent.mkdir(exist_ok=True)
                KNOWN.write_text(json.dumps(known, indent=1))
            answer, wanted = known["found"][name], impossible(row)
            fine = answer == "trained" if wanted is None else wanted in answer
            failed += not fine
            print(f"{name}: {answer}{'' if fine else '  (NOT AS EXPECTED)'}", flush=True)
    print(table(known["found"]))
    print(f"{len(rows) - failed} of {len(rows)} as expected")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
