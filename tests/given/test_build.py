"""Ranked videos that users bring become pairs that training takes, and what is wrong with them is said first."""

import json

import pytest
import torch

from alignkit.config import load_config
from alignkit.errors import ConfigError, DataError
from alignkit.given.build import build_given_pairs
from alignkit.localdpo.build import build_pairs
from alignkit.media.videos import read_video, write_video
from alignkit.stores.pairs import PairStore, collate
from alignkit.training.distributed import start_process
from alignkit.training.loop import train

CPU = torch.device("cpu")


@pytest.fixture
def table(clips, tmp_path):
    """Four pairs, clip against its mirror image, the first with a mask; a fifth whose videos are the same."""
    rows = []
    for number, entry in enumerate(map(json.loads, (clips / "captions.jsonl").read_text().splitlines()[:5])):
        chosen = clips / entry["video"]
        rejected = tmp_path / f"{number}.mp4"
        write_video(rejected, read_video(chosen).flip(2), 8)
        rows.append({"prompt": f"{number}: {entry['caption']}", "chosen": str(chosen), "rejected": rejected.name})
    (tmp_path / "box.json").write_text(json.dumps({"static": [[0, 0, 24, 48]]}))
    rows[0]["mask"] = "box.json"
    rows[4]["rejected"] = rows[4]["chosen"]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def process():
    return start_process()


@pytest.fixture
def config(overrides, config_file, table, tmp_path):
    """`config("objective.name=dpo")` over the table."""
    settings = [text for text in overrides(tmp_path / "run") if not text.startswith("data.videos")]
    settings += ["data.height=48", "data.width=48", "data.num_frames=17"]  # the clips as they are
    return lambda *more: load_config(config_file, [*settings, f"data.pairs={table}", "data.heldout=0.25", *more])


def test_rows_become_pairs_and_the_bad_one_is_listed(config, wan):
    settings = config()
    assert build_given_pairs(settings, CPU) == {"train": 3, "heldout": 1}
    stores = [PairStore(settings.output.dir / "pairs" / split) for split in ("train", "heldout")]
    pairs = {pair.id: pair for store in stores for pair in store}
    assert sorted(pairs) == [0, 1, 2, 3], "the ids are row numbers, whichever rows are bad"
    (listed,) = map(json.loads, (settings.output.dir / "skipped.jsonl").read_text().splitlines())
    assert listed["video"] == "pairs.jsonl:5" and listed["kind"] == "identical"
    assert (pairs[1].mask == 1).all() and pairs[1].strength is None
    assert pairs[0].mask[0, :, :, :6].all() and not pairs[0].mask[0, :, :, 6:].any()
    frames = read_video(pairs[0].source)[None]
    assert torch.equal(wan.encode_video(frames)[0], pairs[0].winner)
    assert stores[0].info.kind == "given" and stores[0].info.model is None


def test_pairs_in_tiles_and_as_ever_are_not_mixed(config):
    build_given_pairs(config(), CPU)
    with pytest.raises(DataError, match="holds pairs made with vae_tiling = "):
        build_given_pairs(config("model.vae_tiling=true"), CPU)


def test_a_second_build_looks_at_nothing_again_unless_a_file_changed(config, table, monkeypatch):
    settings = config()
    build_given_pairs(settings, CPU)
    for name in ("decode_with_facts", "read_mask"):
        monkeypatch.setattr(f"alignkit.given.validation.{name}", lambda *_: pytest.fail("looked again"))
    assert build_given_pairs(settings, CPU) == {"train": 3, "heldout": 1}
    (table.with_name("1.mp4")).touch()  # another date, the same pictures: looked at again, and taken
    monkeypatch.undo()
    assert build_given_pairs(settings, CPU) == {"train": 3, "heldout": 1}
    write_video(table.with_name("0.mp4"), read_video(table.with_name("0.mp4")).flip(1), 8)
    before = {pair.id: pair for pair in PairStore(settings.output.dir / "pairs" / "train")}
    build_given_pairs(settings, CPU)  # other pictures: the pairs of that video are made again, no others
    changed = [
        pair.id
        for pair in PairStore(settings.output.dir / "pairs" / "train")
        if not torch.equal(pair.winner, before[pair.id].winner) or not torch.equal(pair.loser, before[pair.id].loser)
    ]
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    assert changed == [i for i in before if "0.mp4" in (rows[i]["chosen"], rows[i]["rejected"])]
    table.write_text("".join(json.dumps(row) + "\n" for row in rows[1:]))
    with pytest.raises(DataError, match="was built from other videos, captions or masks"):
        build_given_pairs(settings, CPU)


def test_held_out_pairs_of_their_own_are_counted_on(config, table, tmp_path):
    rows = table.read_text().splitlines(keepends=True)
    table.write_text("".join(rows[:2]))
    other = tmp_path / "heldout.jsonl"
    other.write_text("".join([*rows[2:4], rows[0]]))
    settings = config(f"data.heldout_pairs={other}")
    assert build_given_pairs(settings, CPU) == {"train": 2, "heldout": 2}
    assert PairStore(settings.output.dir / "pairs" / "heldout").ids == [2, 3]
    listed = [json.loads(line) for line in (settings.output.dir / "skipped.jsonl").read_text().splitlines()]
    assert {row["kind"] for row in listed} == {"leaked_video", "leaked_prompt"}
    assert {row["video"] for row in listed} == {"heldout.jsonl:3"}


def test_a_line_that_was_mended_is_no_longer_reported(config, table):
    rows = table.read_text()
    table.write_text(rows + "{not json\n")
    settings = config()
    build_given_pairs(settings, CPU)
    skipped = settings.output.dir / "skipped.jsonl"
    assert "pairs.jsonl:6" in skipped.read_text()
    table.write_text(rows)
    build_given_pairs(settings, CPU)
    assert "pairs.jsonl:6" not in skipped.read_text()


def test_a_mask_too_small_for_the_latents_is_found_before_anything_is_encoded(config, table):
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    (table.parent / "speck.json").write_text(json.dumps({"static": [[0, 0, 2, 1]]}))
    rows[1]["mask"] = "speck.json"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = config()
    assert sum(build_given_pairs(settings, CPU).values()) == 3
    listed = [json.loads(line) for line in (settings.output.dir / "skipped.jsonl").read_text().splitlines()]
    found = [(row["video"], row["kind"]) for row in listed]
    assert found == [("pairs.jsonl:2", "mask"), ("pairs.jsonl:5", "identical")]


def test_files_of_one_name_are_told_apart_and_pairs_without_any_mask_are_remarked_on(config, table, tmp_path, capsys):
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    del rows[0]["mask"]
    for row in rows:
        row["rejected"] = str(tmp_path / row["rejected"])
    table.write_text("".join(json.dumps(row) + "\n" for row in rows[:2]))
    other = tmp_path / "other" / table.name
    other.parent.mkdir()
    other.write_text("".join(json.dumps(row) + "\n" for row in (rows[2], rows[0])))
    settings = config(f"data.heldout_pairs={other}")
    build_given_pairs(settings, CPU)
    shown = capsys.readouterr().err
    assert f"{other}:2" in shown and f"is trained on too ({table}:1)" in shown
    assert "no pair has a mask, so both terms of local_dpo are the same" in shown


def test_why_no_row_is_left_is_said_of_each_and_nothing_is_written(config, table, capfd):
    rows = [json.loads(line) for line in table.read_text().splitlines()[:2]]
    table.write_text("".join(json.dumps({**row, "rejected": row["chosen"]}) + "\n" for row in rows))
    settings = config()
    for _ in range(2):  # the second time from memory
        with pytest.raises(DataError, match="no pair is left to train on"):
            build_given_pairs(settings, CPU)
        said = capfd.readouterr().err
        assert said.count("skipped pairs.jsonl:1: ") == said.count("skipped pairs.jsonl:2: ") == 1
        assert not settings.output.dir.exists()


def test_useless_pairs_are_left_out_and_listed(config, monkeypatch):
    settings = config()
    monkeypatch.setattr("alignkit.models.wan.WanModel.encode_video", lambda model, frames: torch.zeros(1, 8, 5, 12, 12))
    build_given_pairs(settings, CPU)
    reasons = [json.loads(line)["reason"] for line in (settings.output.dir / "skipped.jsonl").read_text().splitlines()]
    assert reasons.count("winner and loser are the same inside the mask") == 4


@pytest.mark.parametrize("objective", ["dpo", "local_dpo"])
def test_training_takes_them(config, process, objective):
    settings = config(f"objective.name={objective}", "train.steps=2", "train.global_batch_size=2")
    build_given_pairs(settings, CPU)
    train(settings, process)
    rows = [json.loads(line) for line in (settings.output.dir / "train/metrics.jsonl").read_text().splitlines()]
    assert rows[0]["rewards/margins"] == 0 and rows[1]["rewards/margins"] != 0
    assert collate(list(PairStore(settings.output.dir / "pairs" / "train"))).strength is None


def test_videos_and_pairs_together_are_refused(config, clips):
    with pytest.raises(ConfigError, match=r"set data\.videos or data\.pairs, not both"):
        config(f"data.videos={clips}")


def test_validate_prints_every_problem_and_ends_with_2(command, config_file, config, table, tmp_path):
    settings = ["data.height=48", f"data.pairs={table}", f"output.dir={tmp_path / 'run'}"]
    result = command("validate", config_file, *settings)
    assert result.returncode == 2
    assert "pairs.jsonl:5: " in result.stderr and "show the same" in result.stderr
    assert "1 thing cannot be used" in result.stderr
    table.write_text("".join(table.read_text().splitlines(keepends=True)[:4]))
    result = command("validate", config_file, *settings)
    assert result.returncode == 0 and "everything can be used" in result.stderr
    assert not (tmp_path / "run" / "pairs").exists(), "nothing is made"


def test_local_pairs_want_videos(config):
    with pytest.raises(DataError, match=r"data\.videos: not set"):
        build_pairs(config(), CPU)


def test_held_out_pairs_that_are_refused_leave_those_to_train_on_as_they_were(config, table, tmp_path):
    rows = table.read_text().splitlines(keepends=True)
    heldout = tmp_path / "heldout.jsonl"
    table.write_text("".join(rows[:2]))
    heldout.write_text(rows[2])
    settings = config(f"data.heldout_pairs={heldout}")
    build_given_pairs(settings, CPU)
    before = {file: file.read_bytes() for file in settings.output.dir.rglob("*") if file.is_file()}
    table.write_text("".join(row.replace('"0: ', '"0, mended: ') for row in rows[:2]))
    heldout.write_text("".join(rows[2:4]))
    with pytest.raises(DataError, match="heldout: was built from other videos, captions or masks"):
        build_given_pairs(settings, CPU)
    assert {file: file.read_bytes() for file in settings.output.dir.rglob("*") if file.is_file()} == before
