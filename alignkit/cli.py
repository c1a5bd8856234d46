"""The `alignkit` command: reads arguments, runs a stage, turns errors a user can mend into one line and exit code 2."""

import json
import os
import sys
import time
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from io import TextIOWrapper
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Literal, NoReturn

import typer

from alignkit import __version__
from alignkit.config import (
    Config,
    Family,
    check_places,
    demo_config,
    full_name,
    load_config,
    shipped_config,
    shipped_configs,
)
from alignkit.errors import AlignkitError, ConfigError
from alignkit.launch import (
    ENDED,
    SHARING,
    first_of_several,
    group_size,
    groups_of,
    launched,
    lost_peer,
    run_processes,
    slurm_group,
)
from alignkit.preparing import look, quiet_libraries, say_soon

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Preference alignment of text-to-video diffusion transformers: real videos in, an aligned model out.",
    epilog="Each stage reads one YAML file; any key can be overridden: alignkit train run.yaml train.steps=200",
)


def path(text: str) -> Path:
    """What bash leaves in --out=~/x is the home folder all the same. Raises ConfigError for that of nobody."""
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{text}: {error}") from None


PathArgument, PathOption = partial(typer.Argument, parser=path), partial(typer.Option, parser=path)

ConfigFile = Annotated[
    Path, PathArgument(metavar="CONFIG", help="a YAML file, a run's folder, or a name that `alignkit configs` lists")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="override any key, e.g. train.learning_rate=1e-6")
]

Processes = Annotated[
    int, typer.Option("--nproc", min=1, help="Processes to start on this machine (torchrun and deepspeed work too).")
]

Reshape = Annotated[
    bool, typer.Option("--reshape", help="Resume from a checkpoint of another number of processes: it is converted.")
]

EXPERIMENTS = Path("runs/experiment")


def _version(asked: bool) -> None:
    if asked:
        print(f"alignkit {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def demo(
    overrides: Overrides = None,
    family: Annotated[Family, typer.Option(help="Which of the small models.")] = "wan",
    videos: Annotated[
        Path | None, PathOption(help="A folder of your own videos with captions, instead of drawn clips.")
    ] = None,
    out: Annotated[
        Path | None,
        PathOption(help="Where everything is written; by itself runs/demo, or runs/demo-cogvideox, -videos."),
    ] = None,
    nproc: Processes = 1,
) -> None:
    """Run every stage on a small model that comes with alignkit, on this machine, and write a report."""
    several = _to_be_started("demo", nproc)
    settings, clips = demo_config(family, videos, out, overrides or [])
    if clips is None:
        check_places("run", settings)
    look("demo", settings, nproc)
    if several:
        options = {"--family": family, "--videos": videos, "--out": out}
        words = [str(word) for option in options.items() if option[1] is not None for word in option]
        sys.exit(run_processes(["demo", *words, *(overrides or [])], nproc))
    quiet_libraries()
    from alignkit.demo import run

    run(settings, clips)


@app.command()
def configs() -> None:
    """List the configurations that come with alignkit. A name stands for its file wherever a CONFIG is wanted."""
    known = shipped_configs()
    for name, about in known.items():
        print(f"{name:{max(map(len, known))}}  {about}")


@app.command()
def init(name: Annotated[str, typer.Argument(help="wan2.1-14b, wan2.1-14b-apo, …: see alignkit configs")]) -> None:
    """Print a configuration that comes with alignkit, to begin with: alignkit init wan2.1-14b > run.yaml"""
    full = full_name(name)
    typer.echo(shipped_config(f"{full}.yaml").read_bytes(), nl=False)  # in UTF-8, whatever the locale has
    if full != name:
        print(f"init: {full}", file=sys.stderr)


@app.command()
def rollout(config: ConfigFile, overrides: Overrides = None, nproc: Processes = 1) -> None:
    """Sample videos to be ranked: rollout.per_prompt for each prompt of data.prompts, from noise that training can
    make again; with noise.source=path, with states that the sampler visited.

    Any number of processes share the work, and sampling that was stopped goes on where it was.
    """
    _share("rollout", config, overrides, nproc)


@app.command()
def pairs(config: ConfigFile, overrides: Overrides = None, nproc: Processes = 1) -> None:
    """Make preference pairs: each real video wins against itself with random regions regenerated by the base model.

    With data.pairs, encode videos that are ranked already; with data.rollouts beside it, pair rollouts by their
    numbers. Any number of processes share the work, and a build that was stopped goes on where it was: run the same
    command again, anywhere that sees the folder.
    """
    _share("pairs", config, overrides, nproc)


ranking = typer.Typer(no_args_is_help=True, help="Say which of two videos of a prompt is better.")
app.add_typer(ranking, name="rank")


@ranking.command("run")
def rank_run(config: ConfigFile, overrides: Overrides = None) -> None:
    """Have ranker.by compare the rollouts of each prompt; the best and the worst of each become pairs.

    Every answer is kept, and a run that was stopped goes on where it was.
    """
    _run("rank", _settings("rank", config, overrides))


@ranking.command("serve")
def rank_serve(
    folder: Annotated[Path, PathArgument(help="A folder with comparisons.jsonl: a run's rankings, or a blind set.")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 0,
    open_browser: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
) -> None:
    """Ask people on a page of this machine: two videos side by side, blind, by keyboard. Every vote is kept."""
    say_soon("rank serve: starting")
    from alignkit.rankers.people.server import serve

    serve(folder, port, open_browser)


@ranking.command("results")
def rank_results(folder: Annotated[Path, PathArgument(help="The same folder.")]) -> None:
    """Print how often each kind of video won, with 95 % intervals, and how far the raters agree."""
    say_soon("rank results: starting")
    from alignkit.rankers.people import summary

    print("\n".join(summary(folder)))


@app.command()
def validate(config: ConfigFile, overrides: Overrides = None) -> None:
    """Look through data.videos, data.pairs or data.prompts for what cannot be used, and say why; nothing is made."""
    settings = _settings("validate", config, overrides)
    quiet_libraries()
    from alignkit.commands import validate

    validate(settings)


@app.command()
def train(
    config: ConfigFile,
    overrides: Overrides = None,
    nproc: Processes = 1,
    reshape: Reshape = False,
) -> None:
    """Train on the pairs with DeepSpeed and export a diffusers folder; run again to resume.

    With stages: [...] in the file, each stage in its turn, from the weights of the one before.
    """
    overrides = [*(overrides or []), *(["train.reshape=true"] if reshape else [])]
    several = _to_be_started("train", nproc)
    settings = _settings("train", config, overrides, nproc)
    if several:
        from alignkit.commands import check_train

        check_train(settings, nproc)
        _start_several("train", config, overrides, nproc)
    _run("train", settings)


@app.command("run")
def run_everything(config: ConfigFile, overrides: Overrides = None, nproc: Processes = 1) -> None:
    """Everything in a row: pairs, train (a chain of stages: each in its turn), sample, eval and report.

    Run again, it goes on where it was stopped. With a shipped small model and no data named, clips are drawn.
    """
    several = _to_be_started("run", nproc)
    settings = _settings("run", config, overrides, nproc)
    if several:
        _start_several("run", config, overrides, nproc)
    quiet_libraries()
    from alignkit.demo import run

    run(settings)


@app.command("cache-reference")
def cache_reference(config: ConfigFile, overrides: Overrides = None, nproc: Processes = 1) -> None:
    """Compute the reference's errors at everything that training will visit, for reference.strategy=cached.

    Once for all runs with the same base, pairs, noise and batches, whatever their objective. Any number of processes
    share the work; run again to resume, or to add what a longer run needs.
    """
    several = _to_be_started("cache-reference", nproc)
    settings = _settings("cache-reference", config, overrides)
    if several:
        from alignkit.commands import check_cache_reference

        check_cache_reference(settings)
        _start_several("cache-reference", config, overrides, nproc)
    _run("cache-reference", settings)


@app.command()
def sample(config: ConfigFile, overrides: Overrides = None, nproc: Processes = 1) -> None:
    """Sample held-out prompts from the base and the aligned model, from the same noise.

    Any number of processes share the work, and sampling that was stopped goes on where it was. What other weights or
    settings made is deleted, and said so: of the base and of the aligned model apart.
    """
    _share("sample", config, overrides, nproc)


@app.command("eval")
def evaluate(config: ConfigFile, overrides: Overrides = None, nproc: Processes = 1) -> None:
    """Measure held-out pairs and samples before and after; say whether alignment was reached.

    Any number of processes share the work of the models, and measuring that was stopped goes on where it was.
    """
    _share("eval", config, overrides, nproc)


@app.command()
def report(config: ConfigFile, overrides: Overrides = None) -> None:
    """Write one self-contained HTML page with curves, pairs, samples and numbers."""
    _run("report", _settings("report", config, overrides))


@app.command()
def compare(
    first: Annotated[Path, PathArgument(metavar="RUN_A", help="A run's output.dir, sampled.")],
    second: Annotated[Path, PathArgument(metavar="RUN_B", help="Another, with the same held-out prompts.")],
    out: Annotated[Path | None, PathOption(help="A JSON file for the same numbers.")] = None,
) -> None:
    """Compare the samples of two runs, drawn from the same prompts and noise: each measure's means, their difference
    and its 95 % interval, and the settings that differ."""
    settings = [load_config(run) for run in (first, second)]
    say_soon("compare: starting")
    quiet_libraries()
    from alignkit.evaluation.comparison import compare as compared
    from alignkit.evaluation.comparison import described
    from alignkit.files import write_json

    with TemporaryDirectory() as work:
        found = compared(settings[0], settings[1], Path(work))
    print(described(found))
    if out is not None:
        write_json(out, asdict(found))


@app.command()
def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    gpus: Annotated[int, typer.Option(min=1, help="How many, over all machines.")] = 8,
    gpu: Annotated[str, typer.Option(help="Which: H100, H200 or A100-80G.")] = "H100",
) -> None:
    """Say what a run takes before anything is downloaded or loaded: memory by part, disk, FLOPs, time, and what to turn
    first where it does not fit."""
    from alignkit.planning.constants import gpu_named
    from alignkit.stages import stage_configs

    kind = gpu_named(gpu)
    settings = load_config(config, overrides or [])
    stage_configs(settings)
    say_soon("plan: starting")
    quiet_libraries()
    from alignkit.planning.plan import plan as planned
    from alignkit.planning.report import report as described

    print(described(planned(settings, kind, gpus)))


@app.command()
def doctor(
    run: Annotated[Path | None, PathArgument(metavar="[RUN]", help="A run's output.dir: what happened to it.")] = None,
    output: Annotated[Path | None, PathOption(help="A folder that runs are to write to: its disk and locks.")] = None,
    hashed: Annotated[bool, typer.Option("--hash", help="With RUN: read every byte of its checkpoints.")] = False,
) -> None:
    """Say what this machine will use, what will be slow or broken, and what to do; or with RUN what happened to a run,
    what of it is saved, and the command that goes on. Nothing is written, no weights are loaded."""
    from alignkit.doctor import printed

    say_soon("doctor: starting")
    if run is not None:
        if output is not None:
            raise ConfigError("doctor: RUN looks at a run, --output at a place for one; give one of them")
        from alignkit.doctor.run import diagnose

        print(printed(diagnose(run, hashed=hashed)))
        return
    if hashed:
        raise ConfigError("doctor: --hash goes with RUN")
    from alignkit.doctor.machine import findings

    with suppress(ImportError):  # of what is missing the doctor itself tells
        quiet_libraries()
    print(printed(list(findings(output))))


@app.command()
def experiment(
    name: Annotated[Literal["localdpo", "apo", "manifold", "paths"], typer.Argument(help="Which experiment.")],
    family: Annotated[
        Family | None, typer.Option(help="localdpo, apo: which of the small models; wan unless named.")
    ] = None,
    out: Annotated[Path, PathOption(help="Where everything is written and taken up again.")] = EXPERIMENTS,
    smoke: Annotated[bool, typer.Option(help="A few steps: minutes, and no conclusions.")] = False,
    config: Annotated[
        Path | None,
        PathOption(help="localdpo: compare the methods on this configuration's model and videos."),
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="with --config: override any key of it")
    ] = None,
    nproc: Processes = 1,
) -> None:
    """Compare losses, with several seeds: on small models, or on points.

    localdpo: LocalDPO with SFT, DPO and its own parts on a small model, on clips never trained on. apo: noise sources,
    timestep laws, stages and a few-step student, on the base's own ranked samples. manifold: FlowDPO,
    SFT and the winner-guarded loss on points of a curved surface, where leaving the data shows. paths: how far training
    states lie from those that a sampler visits, by noise source, where the field is known (seconds).
    """
    if name not in ("localdpo", "apo") and family is not None:
        raise ConfigError(f"experiment {name}: it knows no model's weights; leave --family out")
    if name == "paths":
        if smoke or nproc > 1:
            raise ConfigError("experiment paths: takes seconds; leave --smoke and --nproc out")
        say_soon(f"experiment: starting, in {out / 'paths'}")
        quiet_libraries()
        from alignkit.experiments import paths

        paths.run(out / "paths")
        return
    if config is not None:
        if name != "localdpo" or smoke or nproc > 1 or family is not None:
            raise ConfigError("experiment --config: goes with localdpo alone, without --family, --smoke and --nproc")
        _settings("experiment", config, [*(overrides or []), f"output.dir={json.dumps(str(out / 'full'))}"])
        quiet_libraries()
        from alignkit.experiments import full

        full.run(config, out / "full", overrides or [])
        return
    if overrides:
        raise ConfigError("experiment: key=value goes with --config alone")
    family = family or "wan"
    if launched() and group_size(os.environ) > 1:
        raise ConfigError("experiment: its processes train apart, torchrun's together; use --nproc instead")
    if nproc > 1:
        options = ["--out", str(out), *(["--smoke"] if smoke else [])]
        options += ["--family", family] if name in ("localdpo", "apo") else []
        sys.exit(run_processes(["experiment", name, *options], nproc, together=False))
    folder = out / ("smoke" if smoke else "whole")
    say_soon(f"experiment: starting, in {folder}")
    if name == "manifold":
        from alignkit.experiments import manifold

        manifold.run(folder, smoke=smoke)
    else:
        quiet_libraries()
        from alignkit.experiments import apo, localdpo

        {"apo": apo, "localdpo": localdpo}[name].run(family, folder, smoke=smoke)


def _settings(command: str, config: Path, overrides: list[str] | None, nproc: int = 1) -> Config:
    settings = load_config(config, overrides or [])
    look(command, settings, nproc)
    return settings


def _to_be_started(command: str, count: int) -> bool:
    """Whether this process is to launch `count` others, not one of them itself."""
    if count == 1 or launched():
        return False
    if command not in SHARING and slurm_group(os.environ):
        raise ConfigError(f"{command}: --nproc: srun has started its processes already; leave --nproc out")
    return True


def _start_several(command: str, config: Path, overrides: list[str] | None, count: int) -> NoReturn:
    """Become the launcher of `count` processes of the same command."""
    sys.exit(run_processes([command, str(config), *(overrides or [])], count))


def _share(name: str, config: Path, overrides: list[str] | None, nproc: int) -> None:
    """Run a command of SHARING: as the launcher of `nproc` processes, or as one that may have others beside it."""
    settings = _settings(name, config, overrides)
    key, degree = f"{name}.context_parallel", getattr(getattr(settings, name, None), "context_parallel", 1)
    if _to_be_started(name, nproc):
        groups_of(key, degree, nproc)
        _start_several(name, config, overrides, nproc)
    if degree > 1:
        groups_of(key, degree, group_size(os.environ))
    _run(name, settings)


def _run(name: str, config: Config) -> None:
    quiet_libraries()
    from alignkit.commands import run_command

    run_command(name, config)


def run() -> None:
    """Entry point. Exit codes: 0 done, 2 something the user can mend (one line on standard error), 1 anything else (a
    line too where another process has ended)."""
    # the deepspeed launcher puts it first; the same number is in LOCAL_RANK, which is what we read
    sys.argv[1:] = [word for word in sys.argv[1:] if not word.startswith("--local_rank=")]
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as standard error: not every locale has a ×
    try:
        app()
    except (AlignkitError, OSError) as error:
        message = str(error)
        if not isinstance(error, AlignkitError):
            if error.filename is None:
                raise
            message = f"{error.filename}: {error.strerror}"
        if not first_of_several():
            time.sleep(2)  # what all processes stumble over, the first one says; the launcher ends the others
        from alignkit.progress import say

        say(f"alignkit: {message}")
        sys.exit(2)
    except RuntimeError as error:
        if not lost_peer(error):
            raise
        from alignkit.progress import say

        why = str(error).splitlines()[0]
        say(f"alignkit: another process of this command has ended, or cannot be reached{ENDED} ({why})")
        sys.exit(1)
