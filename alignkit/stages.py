"""The stages of a run, each timed, each reading what the one before left in `output.dir`."""

import json
import resource
import time

import numpy as np
import torch

from alignkit.config import Config, dump_config
from alignkit.data.pairs import PairStore
from alignkit.files import write_atomically, write_json
from alignkit.localdpo.build import build_pairs, pairs_folder
from alignkit.models import load_model
from alignkit.progress import say
from alignkit.training.distributed import set_threads, start_process
from alignkit.training.engine import accumulation_steps

PAIRS_IN_REPORT = 6


def run_stage(name: str, config: Config) -> None:
    """Run one of STAGES and record how long it took and how much memory the process has used at most."""
    start = time.perf_counter()
    STAGES[name](config)
    seconds = time.perf_counter() - start
    if name == "train" and not start_process().main:
        return
    file = config.output.dir / "stages.json"
    stages = json.loads(file.read_text()) if file.exists() else {}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    write_json(file, stages | {name: {"seconds": round(seconds, 2), "peak_memory_gb": round(peak, 3)}})
    say(f"{name} took {seconds:.0f} s")


def check_train(config: Config, processes: int) -> None:
    """What can be wrong with a training run before any process is started."""
    accumulation_steps(config, processes)
    PairStore(pairs_folder(config, "train"))


def _pairs(config: Config) -> None:
    set_threads(1)
    config.output.dir.mkdir(parents=True, exist_ok=True)
    write_atomically(config.output.dir / "config.yaml", dump_config(config).encode())
    for split, count in build_pairs(config, _device()).items():
        say(f"{count} {split} pairs in {pairs_folder(config, split)}")


def _train(config: Config) -> None:
    from alignkit.training.loop import train

    train(config, start_process())


def _sample(config: Config) -> None:
    from alignkit.evaluation.samples import sample

    set_threads(1)
    sample(config, _device())


def _eval(config: Config) -> None:
    from alignkit.evaluation.summary import evaluate, summary_file

    set_threads(1)
    summary = evaluate(config, _device())
    write_json(summary_file(config), summary | _costs(config))


def _report(config: Config) -> None:
    from alignkit.evaluation.summary import summary_file
    from alignkit.report import write_report

    file = summary_file(config)
    if file.exists():
        write_json(file, json.loads(file.read_text()) | _costs(config))
        _decode_pairs(config)
    say(f"report: {write_report(config.output.dir)}")


def _decode_pairs(config: Config) -> None:
    """Some held-out pairs as pictures: winner, loser and mask in report_pairs/NNN.npz."""
    folder = config.output.dir / "report_pairs"
    folder.mkdir(exist_ok=True)
    model = load_model(config.model, with_transformer=False, device=_device())
    store = PairStore(pairs_folder(config, "heldout"))
    for i in range(min(PAIRS_IN_REPORT, len(store))):
        pair = store[i]
        winner, loser = model.decode_video(torch.stack([pair.winner, pair.loser]).to(_device())).numpy()
        np.savez_compressed(
            folder / f"{i:03d}.npz",
            winner=winner,
            loser=loser,
            mask=model.frames_of_mask(pair.mask).numpy(),
            prompt=pair.prompt,
            strength=pair.strength,
        )


def _costs(config: Config) -> dict:
    file = config.output.dir / "stages.json"
    stages = json.loads(file.read_text()) if file.exists() else {}
    return {
        "seconds": {name: stage["seconds"] for name, stage in stages.items()},
        "peak_memory_gb": max((stage["peak_memory_gb"] for stage in stages.values()), default=None),
    }


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


STAGES = {"pairs": _pairs, "train": _train, "sample": _sample, "eval": _eval, "report": _report}
