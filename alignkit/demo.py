"""`alignkit demo`: every stage in a row on the shipped small model, from drawn clips or a folder of the user's own."""

import json
from pathlib import Path

from alignkit.commands import run_command
from alignkit.config import Config, Family, ModelSection, load_config, shipped_config
from alignkit.progress import progress, say
from alignkit.stages import stage_configs
from alignkit.tiny.clips import write_clips

STAGES = ("pairs", "train", "sample", "eval", "report")
VERDICTS = {"reached": "reached", "not reached": "NOT reached", "cannot be judged": "cannot be judged"}
CLIPS = 160
CLIPS_SEED = 20_260  # other clips than the shipped weights were trained on


def run_demo(family: Family, videos: Path | None, out: Path | None, overrides: list[str]) -> None:
    """Draw clips (unless `videos` names a folder), then pairs, train, sample, eval and report, all under `out`.

    Run again with the same folder it continues where it was stopped.
    """
    if out is None:
        marks = [family] * (family != ModelSection().family) + ["videos"] * (videos is not None)
        out = Path("runs") / "-".join(["demo", *marks])
    folder = videos or out / "clips"
    settings = [f"data.videos={json.dumps(str(folder))}", f"output.dir={json.dumps(str(out))}", *overrides]
    config = load_config(shipped_config(f"{family}-tiny-localdpo.yaml"), settings)
    stage_configs(config)  # refused before anything slow starts
    if videos is None:
        draw_clips(folder)
    for number, name in enumerate(STAGES, 1):
        say(f"\n[{number}/{len(STAGES)}] {name}")
        run_command(name, config)
    _conclude(config)


def draw_clips(folder: Path) -> None:
    """The demo's real videos: mp4 files and captions.jsonl, drawn once."""
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
    pipeline = json.loads((config.output.dir / "export/model_index.json").read_text())["_class_name"]
    say(f"model:   {config.output.dir / 'export'}  ({pipeline}.from_pretrained loads it)")
