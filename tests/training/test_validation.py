"""Looks at held-out pairs while a run trains: true, the same on any number of processes, and without a trace in the
training."""

import json
import os
import signal
import sys
import types

import pytest
import torch

from alignkit.config import load_config
from alignkit.doctor.run import diagnose
from alignkit.errors import CheckpointError, ConfigError, DataError
from alignkit.evaluation.pairs import describe, score_pairs
from alignkit.evaluation.samples import sample_latents
from alignkit.media.videos import decode_clip
from alignkit.models import load_model
from alignkit.stages import stage_configs
from alignkit.stages.chain import run_chain
from alignkit.stores.pairs import PairStore
from alignkit.training.distributed import start_process
from alignkit.training.export import aligned_section, export_folder
from alignkit.training.loop import train, train_folder
from alignkit.training.metrics import MetricsLog, read_metrics

LOOKS = ("train.validate_every=2", "train.validate_samples=2", "train.learning_rate=1e-4")


@pytest.fixture
def process():
    return start_process()


def file(config, name):
    return train_folder(config) / f"{name}.jsonl"


def looks(config):
    return read_metrics(file(config, "validation"))


def changed(config, **keys):
    return config.model_copy(update={"train": config.train.model_copy(update=keys)})


@pytest.mark.parametrize(("preset", "processes"), [("zero2", 1), ("zero3", 2)])
def test_training_is_the_same_to_the_last_bit_with_and_without(run_with_pairs, together, process, preset, processes):
    of = f"deepspeed.preset={preset}", "train.steps=3"
    (plain, one), (looked, more) = run_with_pairs("plain", *of, LOOKS[2]), run_with_pairs("looked", *of, *LOOKS)
    if processes == 1:
        train(plain, process), train(looked, process)
    else:
        together((processes, [("train", one), ("train", more)]))
    assert file(looked, "metrics").read_bytes() == file(plain, "metrics").read_bytes()
    weights = [sorted((export_folder(config) / "transformer").glob("*.safetensors")) for config in (plain, looked)]
    assert [path.read_bytes() for path in weights[0]] == [path.read_bytes() for path in weights[1]]
    assert [row["step"] for row in looks(looked)] == [0, 2]
    if processes > 1:
        alone, _ = run_with_pairs("alone", *of, *LOOKS)
        train(alone, process)
        first, second = zip(looks(looked), looks(alone), strict=True)
        assert first[0] == first[1], "before the first step there is nothing to differ by"
        # gradients are added up in another order, and Adam's first steps are sign-like: a weight whose gradient is all
        # rounding parts by up to 2·lr a step
        assert second[0]["winner_error"] == pytest.approx(second[1]["winner_error"], rel=1e-3)


def test_processes_that_share_tokens_look_at_the_same_videos(run_with_pairs, together, process):
    parts = "evaluation.batch_size=1", "sample.batch_size=1"  # of which a group takes the same
    of = "train.steps=2", "train.micro_batch_size=1", "train.global_batch_size=2", *parts, *LOOKS
    (alone, _), (shared, keys) = run_with_pairs("alone", *of), run_with_pairs("shared", *of)
    train(alone, process)
    together((2, [("train", [*keys, "train.context_parallel=2"])]))
    one, two = looks(alone)[0], looks(shared)[0]
    for name in ("winner_error", "loser_error"):  # the same numbers summed in another order, 10³ roundings deep
        assert two[name] == pytest.approx(one[name], rel=1e3 * 2**-24), name
    for i in range(2):
        videos = [train_folder(config) / f"validation/step-00000000-{i}.mp4" for config in (alone, shared)]
        first, second = (decode_clip(video, spec_of(alone)).float() for video in videos)
        assert (first - second).abs().mean() < 1  # a level


def test_a_look_is_what_eval_says_of_the_weights_and_its_samples_are_those_of_sample(run_with_pairs, process):
    config, _ = run_with_pairs("run", *LOOKS, "evaluation.positions=[0.3, 0.7]")
    train(config, process)
    first, *_, last = looks(config)
    assert first["region_accuracy"] == first["global_accuracy"] == 0.5 and first["winner_error_change"] == 0.0
    base, trained = (
        load_model(section, device=torch.device("cpu")) for section in (config.model, aligned_section(config))
    )
    store = PairStore(config.output.dir / "pairs" / "heldout")
    networks = trained.transformer, base.transformer
    told = describe(score_pairs(config, base, store, *networks, "", torch.device("cpu")))
    # fp32 sums of some 10⁴ squares, whichever way ZeRO's linear layers round
    assert last["winner_error"] == pytest.approx(told["error_w_after"], rel=1e3 * 2**-24)
    assert last["winner_error_change"] == pytest.approx(told["error_w_after"] / told["error_w_before"] - 1, abs=2e-4)
    assert last["region_accuracy"] == told["region_accuracy"]
    levels = [row["error_w_after"] / row["error_w_before"] - 1 for row in told["by_timestep"]]
    assert last["winner_error_change_by_noise"] == pytest.approx(levels, abs=2e-4)

    prompts = list(dict.fromkeys(store.rows["prompt"]))
    latents = sample_latents(
        config, trained, [prompts[i % len(prompts)] for i in range(2)], [0, 1], 0, trained.latent_shape(9, 32, 32)
    )
    frames = trained.decode_video(latents).float()
    for i in range(2):
        video = decode_clip(train_folder(config) / f"validation/step-00000006-{i}.mp4", spec_of(config)).float()
        # h264 at 4:2:0 keeps brightness to some levels
        assert (video - frames[i]).abs().mean() < 12
    assert sorted(path.name for path in (train_folder(config) / "validation").glob("*.mp4")) == [
        f"step-{step:08d}-{i}.mp4" for step in (0, 2, 4, 6) for i in range(2)
    ]


def spec_of(config):
    from alignkit.media.videos import VideoSpec

    return VideoSpec(config.data.height, config.data.width, config.data.num_frames)


@pytest.mark.parametrize("moment", ["in the first look", "in a later look", "between"])
def test_a_run_that_is_stopped_and_goes_on_has_the_looks_of_one_that_was_not(
    run_with_pairs, process, monkeypatch, moment
):
    whole, _ = run_with_pairs("whole", *LOOKS)
    train(whole, process)
    parts, _ = run_with_pairs("parts", *LOOKS)
    with monkeypatch.context() as patch:
        write, score = MetricsLog.write, "alignkit.training.validation.Validation._next"
        if moment == "between":
            patch.setattr(MetricsLog, "write", lambda log, step, *rest: (write(log, step, *rest), stop_at(step, 3)))
        else:
            wanted, following = (0 if moment == "in the first look" else 4), validation_next()
            patch.setattr(score, lambda self, step, what: (stop_at(step, wanted), following(self, step, what)))
        assert not train(parts, process)
    assert train(parts, process)
    for name in ("metrics", "validation"):
        assert file(parts, name).read_bytes() == file(whole, name).read_bytes()


def validation_next():
    from alignkit.training.validation import Validation

    return Validation._next


def stop_at(step, wanted):
    if step == wanted:
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_winner_that_gets_worse_than_allowed_ends_the_run_in_order(run_with_pairs, process, capfd):
    free, _ = run_with_pairs("free", *LOOKS, "train.learning_rate=1e-2")
    train(free, process)
    changes = {row["step"]: row["winner_error_change"] for row in looks(free)}
    assert changes[2] > 0.01, "a rate that is far too high"

    config, _ = run_with_pairs("run", *LOOKS, "train.learning_rate=1e-2", "train.max_winner_error=0.01")
    assert train(config, process)
    said = " ".join(capfd.readouterr().err.split())
    assert "after step 2 the winner's error on held-out pairs has changed by" in said and "so it ends here" in said
    assert [row["step"] for row in read_metrics(file(config, "metrics"))] == [1, 2]
    assert (train_folder(config) / "checkpoints/step-00000002/manifest.json").exists() and export_folder(
        config
    ).is_dir()
    record = json.loads((train_folder(config) / "stopped.json").read_text())
    assert record == {"step": 2, "winner_error_change": changes[2], "max_winner_error": 0.01}

    told = " ".join(f"{found.text} {found.advice}" for found in diagnose(config.output.dir))
    assert "ended early after step 2: the winner's error on held-out pairs had changed by +" in told
    assert "alignkit sample" in told and "alignkit train" not in told, "its model is there, to be looked at"

    assert train(config, process), "resuming says so, and trains no further"
    said = " ".join(capfd.readouterr().err.split())
    assert "resuming after step 2" in said and "so it ends here" in said and "higher train.max_winner_error" in said
    assert len(read_metrics(file(config, "metrics"))) == 2

    assert train(changed(config, max_winner_error=1e6), process)
    assert file(config, "metrics").read_bytes() == file(free, "metrics").read_bytes()
    assert looks(config) == looks(free) and not (train_folder(config) / "stopped.json").exists()


def test_a_stage_that_makes_winners_worse_ends_its_chain(run_with_pairs, process, capfd):
    _, settings = run_with_pairs("run", *LOOKS, "train.learning_rate=1e-2", "train.max_winner_error=0.01")
    chain = load_config("wan-tiny-localdpo", [*settings, "stages=[localdpo, sft]"])
    assert not run_chain(chain, process)
    stages = chain.output.dir / "stages"
    assert "so it ends here" in " ".join(capfd.readouterr().err.split())
    assert (stages / "01-localdpo/train/checkpoints/step-00000002").is_dir() and not (stages / "02-sft").exists()
    assert not (stages / "01-localdpo/train/masters.json").exists() and not export_folder(chain).exists()


def test_what_cannot_be_looked_at_is_refused_before_weights_load(run_with_pairs, process, monkeypatch, tmp_path):
    config, settings = run_with_pairs("run", "train.steps=2")
    with pytest.raises(ConfigError, match=r"max_winner_error: is what looks .* set validate_every too"):
        load_config("wan-tiny-localdpo", [*settings, "train.max_winner_error=0.1"])
    stages = "stages=[localdpo, online]"
    with pytest.raises(ConfigError, match=r"entry 2 \(online\): train.validate_every: .* set it to null in this entry"):
        stage_configs(load_config("wan-tiny-localdpo", [*settings, *LOOKS, stages]))
    train(config, process)
    monkeypatch.setattr("alignkit.training.loop.load_network", None)
    looking = changed(config, validate_every=1, steps=4)
    with pytest.raises(CheckpointError, match="this run was begun without it"):
        train(looking, process)
    empty = config.model_copy(update={"pairs": config.pairs.model_copy(update={"folder": tmp_path / "none"})})
    with pytest.raises(DataError, match="no pairs here"):
        train(changed(empty, validate_every=1), process)


def test_another_look_than_the_run_was_begun_with_is_refused(run_with_pairs, process):
    config, _ = run_with_pairs("run", *LOOKS, "train.steps=2", "train.validate_samples=0")
    train(config, process)
    other = config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"seed": 1})})
    with pytest.raises(CheckpointError, match=r"begun with evaluation.seed = 0, now it is 1; put it back"):
        train(changed(other, steps=4), process)


def test_videos_are_in_tensorboard_and_in_weights_and_biases_where_a_project_is_named(
    run_with_pairs, process, monkeypatch
):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logged = []
    run = types.SimpleNamespace(log=lambda values, step: logged.append((step, values)), finish=lambda: None)
    given = []
    wandb = types.SimpleNamespace(init=lambda **keys: given.append(keys) or run, Video=lambda path, format: path)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    config, _ = run_with_pairs("run", *LOOKS, "train.steps=2")
    train(config, process)
    board = EventAccumulator(str(train_folder(config) / "tensorboard"), size_guidance={"images": 0})
    board.Reload()
    for i in range(2):
        events = board.Images(f"samples/{i}")
        assert [event.step for event in events] == [0, 2]
        assert all(
            event.encoded_image_string.startswith(b"GIF8") and b"NETSCAPE" in event.encoded_image_string
            for event in events
        )
    assert [event.step for event in board.Scalars("heldout/winner_error")] == [0, 2]
    assert [step for step, _ in logged] == [0, 1, 2, 2]
    assert logged[0][1]["samples/0"].endswith("step-00000000-0.mp4") and "heldout/region_accuracy" in logged[0][1]
    assert "loss" in logged[1][1] and "seconds" in logged[1][1]
    train(changed(config, steps=4), process)
    assert len({keys["id"] for keys in given}) == 1 and all(keys["resume"] == "allow" for keys in given)


def test_both_families_and_adapters_can_be_looked_at(pairs_of, process, config_file):
    settings, folder = pairs_of("5b")
    more = ("train.steps=2", "train.lora={rank: 2}", "deepspeed.preset=zero3", "sample.guidance_scale=3")
    config = load_config(config_file, [*settings, *LOOKS, *more])
    train(config, process)
    assert [row["step"] for row in looks(config)] == [0, 2]
    assert (folder / "train/validation/step-00000002-1.mp4").exists()
