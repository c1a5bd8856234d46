"""`alignkit demo` and `alignkit run`: every command in a row, from videos to a report."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from alignkit.commands import check_train, run_command
from alignkit.config import Config, draws_clips
from alignkit.config.finding import RUN_FILE
from alignkit.errors import AlignkitError, DataError
from alignkit.files import write_atomically
from alignkit.launch import group_size
from alignkit.localdpo.build import check_settings
from alignkit.progress import progress, say
from alignkit.remembered import stamp
from alignkit.sharing import one_at_a_time, run_lock
from alignkit.stores.folders import SKIPPED, SPLITS, pairs_folder
from alignkit.stores.pairs import PairStore
from alignkit.tiny.clips import write_clips
from alignkit.training.distributed import lone_worker

STAGES = ("pairs", "train", "sample", "eval", "report")
VERDICTS = {"reached": "reached", "not reached": "NOT reached", "cannot be judged": "cannot be judged"}
CLIPS = 160
CLIPS_SEED = 20_260  # other clips than the shipped weights were trained on


def run(config: Config, clips: Path | None = None) -> None:
    """Pairs, train, sample, eval and report, all under `output.dir`. Every process calls this; the first one writes the
    report. Run again with the same folder it continues where it was stopped.

    clips: the folder of `data.videos`, where they are to be drawn first; for a shipped small model that names no data
    they are drawn in any case, into output.dir/clips. A chain of stages without videos or pairs of its own, whose
    stages bring what they train on, is only trained.

    Raises ConfigError, before anything is drawn or written, for settings that the training or the pairs cannot have.
    """
    if draws_clips(config):
        clips = config.output.dir / "clips"
        config = config.model_copy(update={"data": config.data.model_copy(update={"videos": clips})})
    check_train(config, group_size(os.environ), made=False)
    if config.data.videos and not config.data.pairs and not config.data.rollouts:
        check_settings(config)
    if clips is not None:
        draw_clips(clips)
    judged = config.data.videos or config.data.pairs
    names = STAGES if judged or not config.stages else ("train",)
    main = lone_worker().main
    with run_lock(config.output.dir, "run") if main else nullcontext():  # from the first command to the last
        before = _told(config) if main else None
        for number, name in enumerate(names, 1):
            if main or name != "report":
                if main:
                    say(f"\n[{number}/{len(names)}] {name}")
                with _put_back_if_refused(before) if before and name == "train" else nullcontext():
                    run_command(name, config)
    if main and "eval" in names:
        _conclude(config)


def _told(config: Config) -> dict[Path, bytes | None] | None:
    """What `pairs` writes anew where it has nothing to make; None where it has."""
    try:
        for split in SPLITS:
            PairStore(pairs_folder(config, split))
    except DataError:
        return None
    files = [config.output.dir / name for name in (RUN_FILE, "stages.json", SKIPPED)]
    return {file: file.read_bytes() if file.exists() else None for file in files}


@contextmanager
def _put_back_if_refused(files: dict[Path, bytes | None]) -> Iterator[None]:
    """Training keeps the settings that it accepts: where it ends before it has, they are those of a refused command."""
    settings = next(iter(files))
    begun = stamp(settings)
    try:
        yield
    except (AlignkitError, OSError):
        if stamp(settings) == begun:
            for file, content in files.items():
                if content is None:
                    file.unlink(missing_ok=True)
                else:
                    write_atomically(file, content)
        raise


def draw_clips(folder: Path) -> None:
    """The demo's real videos: mp4 files and captions.jsonl, drawn once, by whichever process comes first."""
    with one_at_a_time(folder.with_name(".clips.lock")):
        if (folder / "captions.jsonl").exists():
            return
        with progress("drawing clips", CLIPS) as bar:
            write_clips(folder, CLIPS, CLIPS_SEED, written=bar.advance)


def _conclude(config: Config) -> None:
    summary = json.loads((config.output.dir / "summary.json").read_text())
    say("")
    for check in summary["criteria"]:
        say(f"  {'✓' if check['reached'] else '✗'} {check['text']}")
    for reason in summary["unjudged"]:
        say(f"  ? {reason}")
    total = sum(summary["seconds"].values())
    say(f"alignment {VERDICTS[summary['verdict']]}, {total:.0f} s, {summary['peak_memory_gb']:.1f} GB at most")
    say(f"report:  {config.output.dir / 'report.html'}")
    index = config.output.dir / "export" / "model_index.json"
    loads = "pipeline.load_lora_weights loads its adapters"
    if index.exists():
        loads = f"{json.loads(index.read_text())['_class_name']}.from_pretrained loads it"
    say(f"model:   {index.parent}  ({loads})")
