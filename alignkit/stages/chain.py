"""Runs a chain of stages, or what is left of it."""

from pathlib import Path

from alignkit.config import Config, dump_config
from alignkit.files import write_atomically
from alignkit.objectives.states.checks import check_states
from alignkit.progress import say
from alignkit.stages import stage_configs
from alignkit.stores.folders import pairs_folder
from alignkit.stores.pairs import PairStore
from alignkit.training.distributed import Process
from alignkit.training.export import export_folder
from alignkit.training.loop import Link, train, train_folder


def run_chain(config: Config, process: Process) -> bool:
    """Train every stage of `config.stages` that is not done; the last one exports to output.dir/export. Every process
    calls this. False if a signal ended it early; the same call goes on where it was."""
    stages = stage_configs(config)
    store = PairStore(pairs_folder(config, "train"))
    for _, stage in stages:  # the last one's faults too, before the first one trains
        check_states(stage, store)
    if process.main:
        config.output.dir.mkdir(parents=True, exist_ok=True)
        write_atomically(config.output.dir / "config.yaml", dump_config(config).encode())
    before: Path | None = None
    for number, (name, stage) in enumerate(stages, 1):
        if process.main:
            say(f"stage {number} of {len(stages)}: {name}")
        if not train(stage, process, Link(before, export_folder(config) if number == len(stages) else None)):
            return False
        before = train_folder(stage)
    return True
