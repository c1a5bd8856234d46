"""The command line as a user meets it: help, one clear line for every mistake, and a folder of real-life videos."""

import json
import re
import shutil
import threading
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch
from starting import one_line

from alignkit import cli, demo, preparing
from alignkit.commands import run_command
from alignkit.config import demo_config, load_config
from alignkit.errors import AlignkitError, ConfigError, ModelError
from alignkit.media.videos import VideoSpec, decode_clip, write_video
from alignkit.stores.pairs import PairStore

COMMANDS = (
    "demo", "configs", "init", "doctor", "plan", "rollout", "pairs", "train", "cache-reference", "sample", "eval",
    "report",
)  # fmt: skip


def test_help_lists_every_command_and_each_explains_itself(command):
    text = command("--help").stdout
    for name in COMMANDS:
        assert name in text
        own = command(name, "--help")
        assert own.returncode == 0
        assert "CONFIG" in own.stdout or name in ("demo", "configs", "init", "doctor")


@pytest.mark.parametrize("name", ["pairs", "train", "sample", "eval", "report"])
def test_an_unknown_key_is_refused_by_every_command(command, config_file, tmp_path, name):
    line = one_line(command(name, config_file, f"output.dir={tmp_path}", "train.stepz=3"))
    assert "train.stepz: unknown key; did you mean 'steps'?" in line
    assert not list(tmp_path.iterdir())


def test_a_missing_configuration_is_named(command, tmp_path):
    assert f"{tmp_path / 'no.yaml'}: cannot read" in one_line(command("pairs", tmp_path / "no.yaml"))


NO_PAIRS = "no pairs here; run 'alignkit pairs'"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("train CONFIG", NO_PAIRS),
        ("train CONFIG --nproc 2", NO_PAIRS),
        ("cache-reference CONFIG --nproc 2", NO_PAIRS),
        ("sample CONFIG", NO_PAIRS),
        ("eval CONFIG", NO_PAIRS),
        ("rank run CONFIG ranker.by=motion", "no rollouts here; run 'alignkit rollout'"),
        ("report CONFIG", "summary.json: missing, so there is nothing to report; run 'alignkit eval'"),
        ("report CONFIG model.path=/nowhere", "model.path: /nowhere: no such folder"),
        ("pairs CONFIG", "data.videos: not set"),
        ("pairs CONFIG data.videos=. data.captions=/nowhere", "data.captions: /nowhere does not exist"),
        ("pairs CONFIG data.videos=. model.lora=[/nowhere]", "model.lora: /nowhere: no such folder"),
        ("run CONFIG data.videos=/nowhere", "data.videos: video folder /nowhere does not exist"),
        ("run CONFIG model.path=.", "data.videos: not set"),
        ("demo --videos /nowhere --nproc 2", "data.videos: video folder /nowhere does not exist"),
        ("demo train.stepz=3", "train.stepz: unknown key"),
        ("demo train.global_batch_size=7", "train.global_batch_size: 7 is not a multiple"),
        ("train CONFIG train.global_batch_size=8 --nproc 2", "8 is not a multiple of micro_batch_size (8) times 2"),
        ("experiment localdpo --config /nowhere.yaml", "/nowhere.yaml: cannot read"),
        ("experiment localdpo --config CONFIG train.stepz=3", "train.stepz: unknown key"),
    ],
)
def test_what_a_look_at_files_tells_is_said_before_anything_heavy_is_imported(
    monkeypatch, config_file, tmp_path, words, said
):
    for name in ("quiet_libraries", "run_processes"):
        monkeypatch.setattr(cli, name, lambda *_: pytest.fail("began"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AlignkitError, match=re.escape(said)):
        typed(words.replace("CONFIG", str(config_file) + " output.dir=out" * ("experiment" not in words)))
    assert not list(tmp_path.iterdir())


def typed(words):
    """The command line in this process."""
    cli.app(words.split(), standalone_mode=False)


def test_folders_without_usable_videos_are_refused(command, config_file, overrides, tmp_path):
    out = tmp_path / "out"
    for folder, words in (("missing", "missing"), ("empty", "no videos")):
        if folder == "empty":
            (tmp_path / folder).mkdir()
        line = one_line(command("pairs", config_file, *overrides(out, f"data.videos={tmp_path / folder}")))
        assert words in line
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "a.mp4").write_bytes(b"not a video" * 100)
    (broken / "a.txt").write_text("a caption")
    line = one_line(command("pairs", config_file, *overrides(out, f"data.videos={broken}")))
    assert "0 usable of 1" in line and "said above" in line


def test_bad_videos_are_listed_and_skipped_and_the_rest_is_used(command, config_file, overrides, clips, tmp_path):
    folder, out = tmp_path / "mixed", tmp_path / "out"
    shutil.copytree(clips, folder)
    rows = [json.loads(line) for line in (folder / "captions.jsonl").read_text().splitlines()][:4]
    for file in folder.glob("*.mp4"):
        if file.name not in {row["video"] for row in rows}:
            file.unlink()
    good = {row["video"] for row in rows}
    frames = decode_clip(folder / rows[0]["video"], VideoSpec(48, 48, 17))
    (folder / "corrupt.mp4").write_bytes((folder / rows[0]["video"]).read_bytes()[:2000])
    write_video(folder / "short.mp4", frames[:5], 8)
    write_video(folder / "silent.mp4", frames.flip(2), 8)
    write_video(folder / "odd.mp4", torch.nn.functional.pad(frames, (0, 0, 0, 5, 0, 3)), 8)
    shutil.copy(folder / rows[1]["video"], folder / "twice.mp4")
    rows += [{"video": name, "caption": "a thing"} for name in ("corrupt.mp4", "short.mp4", "odd.mp4", "twice.mp4")]
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = command("pairs", config_file, *overrides(out, f"data.videos={folder}"))
    assert result.returncode == 0, result.stderr
    skipped = {row["video"]: row["reason"] for row in map(json.loads, (out / "skipped.jsonl").read_text().splitlines())}
    assert set(skipped) == {"corrupt.mp4", "short.mp4", "silent.mp4", "twice.mp4"}
    for name, words in (("short", "too short"), ("silent", "caption"), ("twice", "same")):
        assert words in skipped[f"{name}.mp4"]
    used = {pair.source for split in ("train", "heldout") for pair in PairStore(out / "pairs" / split)}
    assert used == good | {"odd.mp4"}


def test_every_stage_in_turn_leaves_a_report(command, config_file, run_with_pairs):
    config, settings = run_with_pairs()
    for stage in ("train", "sample", "eval", "report"):  # after the first, the run's folder says it all
        result = command(stage, *([config_file, *settings] if stage == "train" else [config.output.dir]))
        assert result.returncode == 0, result.stderr
    summary = json.loads((config.output.dir / "summary.json").read_text())
    assert summary["accuracy"]["region"]["before"] == summary["accuracy"]["global"]["before"] == 0.5
    assert set(summary["seconds"]) == {"train", "sample", "eval"}
    assert {"torch", "triton", "diffusers", "deepspeed"} <= set(summary["versions"])
    assert summary["reached"] == all(check["reached"] for check in summary["criteria"])
    page = (config.output.dir / "report.html").read_text()
    assert not re.search(r"(src|href)=.https?:", page)


def test_a_demo_on_own_videos_does_not_meet_what_the_plain_one_left(monkeypatch, clips):
    ran = []
    monkeypatch.setattr(demo, "draw_clips", lambda folder: None)
    monkeypatch.setattr(demo, "run_command", lambda name, config: ran.append((name, config.output.dir)))
    monkeypatch.setattr(demo, "_conclude", lambda config: None)
    for family in ("wan", "cogvideox"):
        for videos in (None, clips):
            demo.run(*demo_config(family, videos, None, []))
    names = ["demo", "demo-videos", "demo-cogvideox", "demo-cogvideox-videos"]
    stages = ("pairs", "train", "sample", "eval", "report")
    assert ran == [(stage, Path.cwd() / "runs" / name) for name in names for stage in stages]


def test_all_of_a_demos_processes_take_part_in_all_but_the_report(monkeypatch, clips, tmp_path):
    started, ran = [], []
    monkeypatch.setattr(cli, "run_processes", lambda words, count: started.append((words, count)) or 0)
    for module, name in ((demo, "draw_clips"), (demo, "_conclude"), (cli, "look")):
        monkeypatch.setattr(module, name, lambda *_: None)
    monkeypatch.setattr(demo, "run_command", lambda name, config: ran.append((name, config.output.dir)))
    with pytest.raises(SystemExit):
        cli.app(["demo", "--nproc", "2", "--videos", str(clips), "train.steps=3", "--out", str(tmp_path / "out")])
    ((words, count),) = started
    assert words[0] == "demo" and count == 2
    monkeypatch.setenv("RANK", "1")
    cli.app([*words, "--nproc", "2"], standalone_mode=False)
    assert ran == [(stage, tmp_path / "out") for stage in ("pairs", "train", "sample", "eval")]


@pytest.mark.parametrize(
    "words",
    [
        "plan wan-tiny-localdpo",
        "compare wan-tiny-localdpo wan-tiny-localdpo",
        "doctor",
        "demo",
        "run wan-tiny-localdpo",
        "rank serve .",
        "rank results .",
        "experiment paths",
        "experiment manifold",
        "experiment localdpo",
        "experiment localdpo --config wan-tiny-localdpo",
    ],
)
def test_a_command_has_a_word_on_its_start_before_it_imports_for_seconds(monkeypatch, words):
    class Said(Exception):
        pass

    def say(word):
        raise Said(word)

    monkeypatch.setattr(cli, "quiet_libraries", lambda: pytest.fail("began in silence"))
    for module in (cli, preparing):
        monkeypatch.setattr(module, "say_soon", say)
    with pytest.raises(Said, match=f"^{words.split()[0]}.*: starting"):
        typed(words)


def test_the_word_is_the_first_processs_and_leaves_what_is_printed_alone(monkeypatch, capfd):
    monkeypatch.setattr(preparing, "NOTICE_S", 0)
    before = set(threading.enumerate())
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        preparing.say_soon(f"plan: starting {rank}")
    for timer in set(threading.enumerate()) - before:
        timer.join()
    out, err = capfd.readouterr()
    assert out == "" and "plan: starting 0\n" in err and "starting 1" not in err


def test_a_tilde_is_the_home_folder_wherever_the_command_line_takes_a_path(monkeypatch, tmp_path):
    """bash leaves it in --out=~/x."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cli.path("~/x") == tmp_path / "x" and cli.path("x/~") == Path("x/~")
    with pytest.raises(ConfigError, match="~nobody-of-that-name/x"):
        cli.path("~nobody-of-that-name/x")
    hints = [
        get_args(hint)
        for command in (*cli.app.registered_commands, *cli.ranking.registered_commands)
        for hint in get_type_hints(command.callback, include_extras=True).values()
    ]
    parsers = [hint[1].parser for hint in hints if hint and "Path" in str(hint[0])]
    assert len(parsers) > 15 and set(parsers) == {cli.path}


@pytest.mark.parametrize("words", ["data.num_frames=18", "pairs.dynamic_guidance=true", "noise.source=path"])
def test_no_clip_is_drawn_for_pairs_that_cannot_be(monkeypatch, config_file, tmp_path, words):
    monkeypatch.setattr(demo, "draw_clips", lambda _: pytest.fail("drawn"))
    for given in (
        demo_config("wan", None, tmp_path / "out", [words]),
        (load_config(config_file, [f"output.dir={tmp_path / 'out'}", words]),),
    ):
        with pytest.raises(ConfigError, match=words.partition("=")[0].rpartition(".")[2]):
            demo.run(*given)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_to_is_one_line(command, config_file, overrides):
    result = command("pairs", config_file, *overrides("/dev/null/run"))
    assert one_line(result).startswith("alignkit: /dev/null")


def test_without_the_extras_the_command_says_what_to_install(command):
    code = "import sys; sys.modules['typer'] = None\nimport runpy; runpy.run_module('alignkit', run_name='__main__')"
    result = command(python=("-c", code), fresh=True)
    assert result.returncode == 2
    assert result.stderr.strip() == (
        "alignkit: the command line needs typer, which is not installed: pip install 'alignkit[train]'"
    )


@pytest.fixture(scope="module")
def finished(command, config_file, made_pairs, overrides, tmp_path_factory):
    """The folder of a run that went through every stage, its settings, and its folder of videos."""
    out = tmp_path_factory.mktemp("finished") / "run"
    shutil.copytree(made_pairs, out)
    settings = overrides(out)
    for stage in ("pairs", "train", "sample", "eval", "report"):
        result = command(stage, config_file, *settings)
        assert result.returncode == 0, result.stderr
    return out, settings


@pytest.mark.parametrize(
    "words",
    [
        ("pairs", "pairs.seed=5"),
        ("pairs", "data.num_frames=10"),
        ("pairs", "data.num_frames=5"),
        ("pairs", "model.vae_tiling=true"),
        ("pairs", "data.captions=/nowhere"),
        ("pairs", "data.videos=/nowhere"),
        ("pairs", "model.max_sequence_length=60"),
        ("train", "train.learning_rate=1"),
        ("train", "train.steps=3"),
        ("train", "train.global_batch_size=5"),
        ("train", "objective.beta=7"),
        ("train", "data.num_frames=5"),
        ("train", "noise.source=path"),
        ("train", "model.family=cogvideox"),
        ("train", "train.accept=[model]"),
        ("train", "stages=[sft, {name: localdpo, reference: {strategy: cached}}]"),
        ("cache-reference", "objective={name: sft}"),
        ("sample", "model.path=/nowhere"),
        ("sample", "data.num_frames=18"),
        ("eval", "evaluation.positions=[2]"),
        ("eval", "data.num_frames=5"),
        ("run", "train.learning_rate=1"),
        ("run", "train.global_batch_size=5"),
        ("run", "data.num_frames=5"),
        ("rollout", "data.videos=null"),
        ("rank", "run", "ranker.by=motion"),
        ("report", "output.dri=x"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_a_command_that_is_refused_changes_nothing(finished, command, config_file, words):
    out, settings = finished
    before = contents(out)
    one_line(command(*words[:-1], config_file, *settings, words[-1]))
    assert contents(out) == before


def contents(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_what_an_evaluation_or_a_page_needs_is_looked_for_before_anything_is_written(
    finished, command, config_file, tmp_path
):
    out, settings = finished
    shutil.copytree(out, tmp_path / "run")
    mine = [*settings, f"output.dir={tmp_path / 'run'}"]
    before = contents(tmp_path / "run")
    line = one_line(command("eval", config_file, *mine, f"data.videos={tmp_path}", "evaluation.positions=[0.3]"))
    assert "no such file; samples are compared with the held-out videos" in line
    assert contents(tmp_path / "run") == before
    shutil.rmtree(tmp_path / "run" / "report_pairs")
    before = contents(tmp_path / "run")
    with pytest.raises(ModelError, match="model_index"):
        run_command("report", load_config(config_file, [*mine, f"model.path={tmp_path}"]))
    assert contents(tmp_path / "run") == before and not (tmp_path / "run" / "report_pairs").exists()
    shutil.rmtree(tmp_path / "run" / "pairs" / "heldout")
    before = contents(tmp_path / "run")
    assert "no pairs here" in one_line(command("report", config_file, *mine))
    assert contents(tmp_path / "run") == before and not (tmp_path / "run" / "report_pairs").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("train.global_batch_size=5", "train.global_batch_size: 5 is not a multiple"),
        ("deepspeed.config={amp: {}}", "deepspeed.config: amp"),
        ("train.lora={targets: [to_q, to_qq]}", "no layer that can have adapters is called 'to_qq'"),
        ("train.context_parallel=3", "train.context_parallel: 3 does not divide"),
        (
            "train={context_parallel: 2, global_batch_size: 4}",
            "train.context_parallel: 2 does not divide the 1 process",
        ),
        ("reference.strategy=cached", "no reference here"),
        ("stages=[sft, {name: localdpo, train: {global_batch_size: 5}}]", "5 is not a multiple"),
    ],
)
def test_a_run_whose_training_cannot_be_is_refused_before_its_pairs_are_made(
    command, config_file, overrides, tmp_path, words, said
):
    result = command("run", config_file, *overrides(tmp_path / "out"), words)
    assert said in one_line(result)
    assert not (tmp_path / "out").exists()


def test_a_run_that_fails_after_it_was_accepted_keeps_the_settings_that_it_was_given(
    command, config_file, made_pairs, overrides, tmp_path
):
    shutil.copytree(made_pairs, tmp_path / "run")
    settings = overrides(tmp_path / "run")
    assert command("run", config_file, *settings, "train.steps=2").returncode == 0
    # so long a rate that its loss is not a number
    result = command(
        "run",
        config_file,
        *settings,
        "train.accept=[train.learning_rate]",
        "train.learning_rate=1e30",
        "train.steps=20",
    )
    assert result.returncode == 2 and "not finite" in result.stderr
    assert load_config(tmp_path / "run" / "config.yaml", []).train.learning_rate == 1e30
