"""One run in the ways in which it may be spread over processes and memory: all of them end with the same numbers.

    python tests/training/ways.py              a pairwise cover: some three minutes on two cores
    python tests/training/ways.py lora         its rows that have all of these words
    python tests/training/ways.py --steps 4    fewer steps than 20

Of each row, the largest relative distance of any step's loss and errors to those of the plain run of the same weights
(one process, both branches together, a copy as reference, nothing recomputed), and the distance of the parameters at
the end and of what training changed in them. Exits with 1 where a loss, an error or the parameters are further away
than TOLERANCE.
"""

import argparse
import itertools
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent))

from matrix import config_of, cover, prepare, train_together

TOLERANCE = 1e-5
NUMBERS = ("loss", "error_w", "error_l")
SETTINGS = (
    "data.height=32", "data.width=32", "data.num_frames=9", "train.learning_rate=1e-4", "train.global_batch_size=4",
    "train.micro_batch_size=1", "objective={beta: 50, loser_safeguard: 0.5}", "pairs.mask={}",
    "pairs.num_inference_steps=4", "pairs.strengths=[3]", "pairs.block_size=4", "pairs.batch_size=4",
)  # fmt: skip


class Way(NamedTuple):
    weights: str
    processes: str
    branches: str
    reference: str
    checkpointing: str
    context: str
    preset: str


AXES = {
    "weights": ("full", "lora"),
    "processes": ("1", "2", "4"),
    "branches": ("together", "apart"),
    "reference": ("copy", "cached", "adapter"),
    "checkpointing": ("none", "selective", "full"),
    "context": ("1", "2"),
    "preset": ("zero2", "zero3"),
}
PLAIN = {weights: Way(weights, "1", "together", "copy", "none", "1", "zero2") for weights in AXES["weights"]}


class Distance(NamedTuple):
    numbers: float
    parameters: float
    change: float


def ways() -> list[Way]:
    """What can work: an adapter is its own reference under LoRA alone, and tokens are shared among two or more."""
    rows = [Way(*values) for values in itertools.product(*AXES.values())]
    return [
        row
        for row in rows
        if not (row.reference == "adapter" and row.weights == "full") and int(row.context) <= int(row.processes)
    ]


def settings_of(row: Way, base: Path, out: Path, steps: int) -> list[str]:
    """base: the folder that `prepare` filled."""
    lora = "{rank: 4, alpha: 8}" if row.weights == "lora" else "null"
    return [
        *SETTINGS, f"model.path={base / 'model'}", f"data.videos={base / 'clips'}",
        f"pairs.folder={base / 'pairs'}", f"output.dir={out}",
        f"train.steps={steps}", f"train.lora={lora}", f"train.branches={row.branches}",
        f"train.checkpointing={row.checkpointing}", f"train.context_parallel={row.context}",
        f"reference.strategy={row.reference}", f"deepspeed.preset={row.preset}",
    ]  # fmt: skip


def run(row: Way, base: Path, out: Path, steps: int) -> None:
    train_together(config_of("wan"), settings_of(row, base, out, steps), int(row.processes))


def distance(weights: str, out: Path, plain: Path, base: Path) -> Distance:
    """Of the run in `out` to the one in `plain`, which both began at what `prepare` put into `base`."""
    from safetensors.torch import load_file

    from alignkit.training.metrics import read_metrics

    rows = [read_metrics(folder / "train" / "metrics.jsonl") for folder in (out, plain)]
    numbers = max(
        abs(one[name] - other[name]) / abs(other[name]) for one, other in zip(*rows, strict=True) for name in NUMBERS
    )
    part = "." if weights == "lora" else "transformer"
    ours, theirs = (load_file(next((folder / "export" / part).glob("*.safetensors"))) for folder in (out, plain))
    start = load_file(next(base.glob("model/transformer/*.safetensors"))) if weights == "full" else {}

    def whole(of) -> float:
        return sum(of(name).double().square().sum() for name in theirs).sqrt().item()

    apart = whole(lambda name: ours[name].double() - theirs[name].double())
    # of an adapter, A starts at random and B at 0: B alone is what training has changed from a known start
    changed = [name for name in theirs if name in start or "lora_B" in name]
    moved = sum((theirs[name].double() - start.get(name, 0)).square().sum() for name in changed) ** 0.5
    ours_moved = sum((ours[name].double() - theirs[name].double()).square().sum() for name in changed) ** 0.5
    return Distance(numbers, apart / whole(theirs.get), float(ours_moved / moved))


def table(found: dict[Way, Distance]) -> str:
    lines = ["| " + " | ".join(AXES) + " | loss and errors | parameters | their change |", "|" + " --- |" * 10]
    for row, distances in found.items():
        lines.append("| " + " | ".join([*row, *(f"{value:.1e}" for value in distances)]) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*")
    parser.add_argument("--steps", type=int, default=20)
    given = parser.parse_args()
    rows, found = [row for row in cover(ways()) if set(given.words) <= set(row)], {}
    with tempfile.TemporaryDirectory() as scratch:
        base = Path(scratch, "base")
        prepare("wan", base)
        for weights in sorted({row.weights for row in rows}):
            plain = Path(scratch, weights)
            run(PLAIN[weights], base, plain, given.steps)
            for number, row in enumerate(row for row in rows if row.weights == weights):
                out = Path(scratch, f"{weights}-{number}")
                run(row, base, out, given.steps)
                found[row] = distance(weights, out, plain, base)
                print(" ".join(row), *(f"{value:.1e}" for value in found[row]), flush=True)
    print(table(found))
    far = [row for row, one in found.items() if max(one.numbers, one.parameters) > TOLERANCE]
    print(f"{len(rows) - len(far)} of {len(rows)} within {TOLERANCE:g} after {given.steps} steps")
    return int(bool(far))


if __name__ == "__main__":
    sys.exit(main())
