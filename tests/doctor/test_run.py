"""`alignkit doctor RUN`: what it says of folders in every state, and that it leaves them as they are."""

import fcntl
import json
import shlex
from pathlib import Path

import pytest

from alignkit.config import dump_config, load_config
from alignkit.doctor import printed
from alignkit.doctor.run import diagnose
from alignkit.errors import ConfigError
from alignkit.sharing import RUN_LOCK, run_lock
from alignkit.training import manifest as manifests

CONFIG = Path(__file__).parents[2] / "configs" / "wan-tiny-localdpo.yaml"


def checkpoint(train: Path, step: int, processes: int = 1) -> Path:
    folder = train / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    for rank in range(processes):
        (folder / f"rank_{rank}_optim_states.pt").write_bytes(b"moments" * step)
    files = {file.name: manifests.file_hash(file) for file in sorted(folder.iterdir())}
    manifest = {"format": 2, "step": step, "world_size": processes, "shards": processes, "terms": {}, "files": files}
    whole = manifest | {"digest": manifests.digest(manifest)}
    (folder / manifests.MANIFEST).write_text(json.dumps(whole))
    return folder


def metrics(train: Path, steps: int, skipped: tuple[int, ...] = ()) -> None:
    train.mkdir(parents=True, exist_ok=True)
    rows = [{"step": step, "loss": 0.69, "skipped": int(step in skipped)} for step in range(1, steps + 1)]
    (train / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 9')


def store(folder: Path, holds: str, planned: int, blocks: int) -> None:
    folder.mkdir(parents=True)
    (folder / f"{holds}.json").write_text(json.dumps({"pairs": planned, "block_size": 4}))
    for number in range(blocks):
        (folder / f"block-{number:05d}.arrow").write_bytes(b"")


@pytest.fixture
def make(tmp_path):
    """`make("train.steps=6")`: the folder of a run whose pairs are done."""

    def run(*keys: str, trains: bool = True) -> Path:
        folder = tmp_path / "run"
        config = load_config(CONFIG, [f"output.dir={folder}", *keys])
        for split in ("train", "heldout"):
            store(folder / "pairs" / split, "pairs", 8, 2)
        (folder / "config.yaml").write_text(dump_config(config))
        return folder

    return run


def said(folder: Path, **options) -> dict[str, str]:
    """What is said, by topic; of one that goes on in lines without a topic, all of them."""
    found: dict[str, str] = {}
    topic = ""
    for finding in diagnose(folder, **options):
        topic = finding.topic or topic
        found[topic] = f"{found.get(topic, '')}\n{finding.text}\n{finding.advice or ''}"
    return found


def goes_on(folder: Path) -> list[str]:
    """The words of the command to go on with, which must be one that reads its configuration."""
    words = shlex.split(said(folder)["next"].strip().splitlines()[0])
    settings = [word for word in words[3:] if "=" in word]
    load_config(Path(words[2]), settings)
    return words


def test_a_killed_run_goes_on_from_its_newest_checkpoint(make):
    run = make("train.steps=6", "train.global_batch_size=4")
    train = run / "train"
    metrics(train, 5, skipped=(3,))
    checkpoint(train, 2), checkpoint(train, 4, processes=2)
    (train / "run.json").write_text('{"processes": 2}')
    (train / "checkpoints" / ".partial-00000006").mkdir()
    (run / RUN_LOCK).write_text('{"command": "train", "process": 77, "host": "gpu3", "since": "noon"}\n')
    found = said(run)
    assert "process 77 on gpu3, begun noon, was killed" in found["writing now"]
    assert "not done: step 5 of 6" in found["train"] and "1 step skipped" in found["train"]
    assert "saved: step-00000004, by 2 processes" in found["train"] and "1 later step will be done" in found["train"]
    assert ".partial-00000006" in found["train"]
    assert goes_on(run) == ["alignkit", "train", f"{run}/config.yaml", "--nproc", "2"]


def test_damaged_checkpoints_are_told_from_whole_ones_by_their_manifest(make):
    run = make("train.steps=6")
    train = run / "train"
    metrics(train, 6)
    first, second, third = (checkpoint(train, step) for step in (2, 4, 6))
    (third / "rank_0_optim_states.pt").unlink()
    damaged = second / "rank_0_optim_states.pt"
    damaged.write_bytes(b"Moments" + damaged.read_bytes()[7:])
    assert "saved: step-00000004" in said(run)["train"] and "step-00000006: rank_0_optim" in said(run)["train"]
    hashed = said(run, hashed=True)["train"]
    assert "saved: step-00000002" in hashed and "step-00000004: rank_0_optim_states.pt does not match" in hashed
    second.rename(second.with_name("damaged-step-00000004"))
    assert "set aside: damaged-step-00000004: rank_0" in said(run, hashed=True)["train"]
    (first / manifests.MANIFEST).write_text("{")
    assert "no checkpoint is whole" in said(run)["train"]
    assert "train.restart=true" in goes_on(run)


def test_a_checkpoint_that_cannot_be_read_just_now_is_said_beside_all_else(make):
    run = make("train.steps=6")
    metrics(run / "train", 6)
    manifest = checkpoint(run / "train", 4) / manifests.MANIFEST
    checkpoint(run / "train", 2)
    manifest.unlink()
    manifest.symlink_to("/proc/self/mem")  # gives EIO
    found = said(run)
    assert "saved: step-00000002" in found["train"] and "the machine cannot read it just now" in found["train"]


def test_who_holds_the_lock_is_said_and_may_go_on(make):
    run = make()
    with run_lock(run, "train"):
        found = said(run)
        assert "alignkit train, process" in found["writing now"] and "killed" not in found["writing now"]
        assert found["next"].strip() == "wait: it is being written"
    with (run / RUN_LOCK).open("w") as stream:  # a process that has it, and has not said so yet
        fcntl.flock(stream, fcntl.LOCK_SH)
        assert "another command" in said(run)["writing now"]


def test_a_run_that_diverged_names_the_batch_and_goes_on_with_a_lower_rate(make):
    import pyarrow
    import pyarrow.parquet

    run = make("train.steps=9", "train.learning_rate=1e-4")
    metrics(run / "train", 6, skipped=(5, 6))
    checkpoint(run / "train", 4)
    rows = pyarrow.table({"id": [3, 5], "source": ["a.mp4", "b.mp4"], "tensors": [b"", b""]})
    pyarrow.parquet.write_table(rows, run / "train" / "diverged-step-6.parquet")
    assert "diverged-step-6.parquet: pairs 3 (a.mp4), 5 (b.mp4)" in said(run)["train"]
    assert "train.learning_rate=5e-05" in goes_on(run) and "train.accept=[train.learning_rate]" in goes_on(run)


def test_a_build_that_was_killed_and_left_no_settings_is_gone_on_with(tmp_path):
    run = tmp_path / "run"
    store(run / "pairs" / "train", "pairs", 8, 1)
    reasons = [{"video": "x.mp4", "reason": "too short"}] * 2 + [{"video": "y.mp4", "reason": "no caption"}]
    (run / "skipped.jsonl").write_text("\n".join(map(json.dumps, reasons)))
    found = said(run)
    assert "not done: 1 of 2 blocks, 8 planned" in found["pairs/train"]
    assert "3 videos or pairs: too short (2); no caption (1)" in found["skipped"]
    assert f"alignkit pairs CONFIG output.dir={run}" in found["next"]


def test_each_stage_of_a_chain_is_said_and_the_first_that_is_not_done_goes_on(make):
    run = make("stages=[{name: sft, train: {steps: 3}}, {name: localdpo, train: {steps: 4}}]")
    first, second = (run / "stages" / name / "train" for name in ("01-sft", "02-localdpo"))
    metrics(first, 3), checkpoint(first, 3)
    (first / "masters.json").write_text("{}"), (first / "masters.safetensors").write_bytes(b"")
    metrics(second, 2), checkpoint(second, 2)
    found = said(run)
    assert "\ndone: step 3 of 3" in found["stages/01-sft"] and "not done: step 2 of 4" in found["stages/02-localdpo"]
    assert said(run / "stages" / "02-localdpo") == found, "a stage's folder is looked at with its chain"
    assert goes_on(run) == ["alignkit", "train", f"{run}/config.yaml"]


def test_what_comes_after_training_is_named_in_turn(make):
    run = make("train.steps=2")
    metrics(run / "train", 2), checkpoint(run / "train", 2)
    assert goes_on(run)[1] == "train", "its export is missing"
    (run / "export").mkdir()
    assert goes_on(run)[1] == "sample"
    for file in ("samples/samples.jsonl", "summary.json"):
        (run / file).parent.mkdir(exist_ok=True)
        (run / file).touch()
    assert goes_on(run)[1] == "report"
    (run / "report.html").touch()
    assert said(run)["next"].strip() == "nothing: all is done"
    moved = run.rename(run.with_name("moved"))
    (moved / "report.html").unlink()
    assert f"output.dir={moved}" in goes_on(moved), "the settings name another folder"


def test_rollouts_are_ranked_and_then_paired(tmp_path):
    run = tmp_path / "run"
    store(run / "rollouts", "rollouts", 4, 1)
    assert "alignkit rank run CONFIG" in said(run)["next"]
    (run / "rankings").mkdir()
    (run / "rankings" / "ranking.jsonl").write_text("{}\n")
    assert f"data.pairs={run}/rankings/ranking.jsonl" in said(run)["next"]


def test_nothing_is_written_and_no_torch_is_imported(make, command):
    run = make()
    metrics(run / "train", 2), checkpoint(run / "train", 2)
    (run / RUN_LOCK).write_text("")
    before = {file: (file.stat().st_mtime_ns, file.is_dir()) for file in run.rglob("*")}
    code = "import sys; from alignkit.__main__ import main; main(); sys.exit(9 if 'torch' in sys.modules else 0)"
    result = command("doctor", run, python=("-c", code), fresh=True)
    assert result.returncode == 0 and "next" in result.stdout, result.stderr
    assert {file: (file.stat().st_mtime_ns, file.is_dir()) for file in run.rglob("*")} == before


@pytest.mark.parametrize("name", ["empty", "nowhere", "file"])
def test_a_folder_that_is_no_run_is_refused(tmp_path, name):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=f"doctor: {tmp_path / name}: no "):
        diagnose(tmp_path / name)


def test_whatever_is_damaged_is_said_and_never_raised(make):
    run = make()
    metrics(run / "train", 2)
    folder = checkpoint(run / "train", 2)
    for file in (run / "config.yaml", run / "pairs/train/pairs.json", folder / manifests.MANIFEST):
        file.write_bytes(b"\xff[1")
    (run / "train" / "diverged-step-2.parquet").write_bytes(b"PAR1")
    (run / RUN_LOCK).write_bytes(b"[]")
    assert "its terms cannot be read" in printed(diagnose(run))
