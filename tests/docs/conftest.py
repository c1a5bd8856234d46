"""A folder with what the pages' commands expect: clips, prompts, pairs, masks; and what answers a command."""

import io
import json
import re
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import typer

sys.path.insert(0, str(Path(__file__).parent))
from doc_shell import Answer, Call, run_block

ROOT = Path(__file__).parents[2]
SHOWN = {"init", "configs"}  # printed even where commands are only read: other lines need what they print


@pytest.fixture(scope="session")
def workspace(clips, tmp_path_factory) -> Path:
    """A working folder as the pages assume it."""
    folder = tmp_path_factory.mktemp("docs")
    for name in ("configs", "benchmarks", "examples", "tests", "kernels", "docs"):
        (folder / name).symlink_to(ROOT / name)
    shutil.copytree(clips, folder / "clips")
    videos = sorted(path.name for path in (folder / "clips").glob("*.mp4"))
    (folder / "prompts.txt").write_text("a red circle moves left on a plain background\n")
    rows = [{"prompt": "a", "chosen": f"clips/{videos[0]}", "rejected": f"clips/{videos[1]}"}]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "run.yaml").write_text((ROOT / "configs" / "wan-tiny-localdpo.yaml").read_text())
    return folder


def read_command(cwd: Path, words: list[str]) -> dict:
    """What the real command line makes of the words: the parameters of the last command, with its configuration read by
    the real reader, as `settings`, if it takes one."""
    from alignkit.cli import app
    from alignkit.config import load_config
    from alignkit.stages import stage_configs

    command = typer.main.get_command(app)
    context = command.make_context("alignkit", list(words))
    while hasattr(command, "resolve_command"):
        rest = [*context._protected_args, *context.args] if hasattr(context, "_protected_args") else context.args
        name, command, rest = command.resolve_command(context, rest)
        context = command.make_context(name, rest, parent=context)
    found = dict(context.params)
    config = found.get("config")
    if config is not None:
        path = cwd / config
        if str(config).startswith("runs/") and not (path / "config.yaml").exists():  # of a run that has begun
            path.mkdir(parents=True, exist_ok=True)
            (path / "config.yaml").write_text((ROOT / "configs" / "wan-tiny-localdpo.yaml").read_text())
        found["settings"] = load_config(path if path.exists() else config, found.get("overrides") or [])
        stage_configs(found["settings"])
    return found


def read(call: Call) -> Answer:
    """Answers a command without running it: by the parser, the reader, or whether what it names is there."""
    words = call.words
    if call.name == "alignkit":
        read_command(call.cwd, words)
        if words[0] in SHOWN:
            from alignkit import cli

            with redirect_stdout(io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True)) as out:
                getattr(cli, words[0])(*words[1:])
            return 0, out.buffer.getvalue().decode()
    elif call.name == "make":
        done = subprocess.run(["/usr/bin/make", "-n", *words], cwd=ROOT, capture_output=True, text=True, check=False)
        return done.returncode, done.stderr
    elif call.name == "pip":
        assert words[0] == "install"
        _installable([word for word in words[1:] if not word.startswith("-")])
    elif call.name == "python":
        _runnable(call.cwd, words)
    elif call.name in ("torchrun", "deepspeed"):
        _launched(call)
    elif call.name == "srun":
        read(call._replace(name="alignkit", words=words[words.index("alignkit") + 1 :]))
    elif call.name == "sbatch":
        place = next(i for i, word in enumerate(words) if not word.startswith("-"))
        assert (call.cwd / words[place]).is_file(), words
        command = re.search(r"alignkit (\w+)", (call.cwd / words[place]).read_text())[1]
        read_command(call.cwd, [command, *words[place + 1 :]])
    return 0, ""


def _installable(requirements: list[str]) -> None:
    extras = set(re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.M))
    for requirement in requirements:
        name, _, wanted = requirement.partition("[")
        assert name in (".", "./kernels", "alignkit", "alignkit-kernels", "lightning"), requirement
        assert set(filter(None, wanted.rstrip("]").split(","))) <= extras, requirement


def _runnable(cwd: Path, words: list[str]) -> None:
    """A file that compiles, or a module that is there."""
    from importlib.util import find_spec

    if words[0] == "-m":
        assert find_spec(words[1]), words
        if words[1] == "pytest":
            assert all((cwd / word).exists() for word in words[2:] if word.startswith("tests")), words
    else:
        compile((cwd / words[0]).read_text(), words[0], "exec")


def _launched(call: Call) -> None:
    """The launcher's words by its own parser, then the command's."""
    if call.name == "torchrun":
        from torch.distributed.run import parse_args

        parsed = parse_args(call.words)
        module, rest = (parsed.training_script, parsed.training_script_args) if parsed.module else (None, None)
        if module is None:
            assert (call.cwd / parsed.training_script).is_file()
            return
    else:
        from deepspeed.launcher.runner import parse_args

        parsed = parse_args(call.words)
        module, rest = parsed.user_script, parsed.user_args
    assert module == "alignkit", call.words
    read_command(call.cwd, rest)


@pytest.fixture(scope="session")
def shell(workspace, tmp_path_factory):
    """`shell(TEXT, answer, *arguments)` runs a block of bash in the workspace, its commands answered by `answer`."""
    jobs = tmp_path_factory.mktemp("jobs")
    return lambda text, answer=read, *arguments: run_block(text, workspace, jobs, answer, *arguments)


@pytest.fixture(scope="session")
def really(command, overrides, workspace):
    """Answers `alignkit` by running it, on settings of seconds, and every other command by reading it. What was run is
    not run again: pages tell the same story."""
    small = overrides(workspace)[3:]  # without the folders of clips, of the base and of the run
    known: dict[tuple[str, ...], Answer] = {}

    def answer(call: Call) -> Answer:
        if call.name != "alignkit":
            return read(call)
        params = read_command(call.cwd, call.words)
        words = list(call.words)
        if call.words[0] != "plan" and params.get("config") is not None and "overrides" in params:
            place = words.index(str(params["config"])) + 1
            words[place:place] = small
        if tuple(words) not in known:
            code = f"import os, sys; os.chdir({str(call.cwd)!r}); from alignkit.__main__ import main; sys.exit(main())"
            done = command(*words, python=("-c", code))
            known[tuple(words)] = done.returncode, done.stdout + done.stderr * bool(done.returncode)
        return known[tuple(words)]

    return answer
