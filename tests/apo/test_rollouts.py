"""Rollouts: the same bits whoever samples them, from noise that their keys give back, with states of their paths."""

import json
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from alignkit.apo import rollouts as apo
from alignkit.apo.rollouts import build_rollouts, rollouts_folder, sample_rows, start_sampling
from alignkit.config import load_config
from alignkit.errors import ConfigError, DataError
from alignkit.models import load_model
from alignkit.stores.origins import keys_of, noise_key
from alignkit.stores.rollouts import RolloutStore
from alignkit_kernels import NoiseKey, Stream, keyed_randn

CPU = torch.device("cpu")


@pytest.fixture
def config(rollout_overrides, config_file, tmp_path):
    """`config("rollout.seed=1")`, written under tmp_path."""
    return lambda *more: load_config(config_file, rollout_overrides(tmp_path / "run", *more))


@pytest.fixture
def store(made_rollouts):
    return RolloutStore(made_rollouts / "rollouts")


def blocks(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.glob("block-*.arrow"))}


def test_a_rollout_sampled_again_from_its_key_is_the_stored_one(store, half_wan, config):
    """From nothing but what its origin says: noise key, schedule, solver, guidance, batch."""
    rollout = store[4]
    recipe, key = (
        rollout.origin.recipe,
        noise_key(keys_of([rollout.origin] * store[4].origin.recipe["regime"]["batch"])),
    )
    seen = {}
    text, negative = (
        half_wan.pad_text(half_wan.encode_text([p] * 2)) for p in (rollout.prompt, recipe["negative_prompt"])
    )
    again = half_wan.sample(
        keyed_randn((2, *recipe["regime"]["latents"]), key, device=CPU), text, negative, num_steps=recipe["steps"],
        guidance=recipe["guidance"], dynamic=recipe["dynamic"], solver=recipe["solver"], watch=seen.__setitem__,
    )  # fmt: skip
    assert torch.equal(again[0], rollout.latents)
    assert (
        recipe["schedule"] == half_wan.schedule(recipe["steps"]).fingerprint
        and recipe["network"] == half_wan.fingerprint()
    )
    for place, row in enumerate(rollout.path_rows):
        assert torch.equal(rollout.path.states[place], seen[row][0])
        assert torch.equal(rollout.path.following[place], seen[row + 1][0])


def test_rollouts_of_a_prompt_share_their_rows_and_other_prompts_have_others(store):
    rows = {}
    for rollout in store:
        rows.setdefault(rollout.prompt_id, set()).add(rollout.path_rows)
    assert [len(found) for found in rows.values()] == [1, 1, 1]
    assert len(set.union(*rows.values())) > 1


def test_every_rollout_has_noise_of_its_own_that_evaluation_never_uses(store, config):
    keys = [rollout.origin.key for rollout in store]
    assert len(set(keys)) == len(keys) and {(key[0], *key[2:]) for key in keys} == {(0, 1, int(Stream.ROLLOUT))}
    noise = keyed_randn((9, 64), noise_key(keys_of([rollout.origin for rollout in store])), device=CPU)
    judged = keyed_randn((9, 64), NoiseKey(0, torch.arange(9), 0, Stream.ROLLOUT), device=CPU)
    assert not (noise[:, None] == judged).all(dim=2).any()


def test_two_processes_make_what_one_makes_and_a_killed_one_is_gone_on_with(
    made_rollouts, rollout_overrides, config_file, start_command, tmp_path
):
    settings = rollout_overrides(tmp_path / "run")
    folder = tmp_path / "run" / "rollouts"
    child = start_command("rollout", config_file, *settings)
    while child.poll() is None and not (folder / "block-00000.arrow").exists():
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert len(blocks(folder)) < 3
    other = start_command("rollout", config_file, *settings, "--nproc", "2")
    assert other.wait(timeout=300) == 0, other.stderr.read()
    assert blocks(folder) == blocks(made_rollouts / "rollouts")
    assert len(list((folder / "previews").glob("*.mp4"))) == 1


class Recorder:
    """A model that notes the noise it is given, and returns it."""

    def __init__(self, model):
        self.model, self.given = model, []

    def __getattr__(self, name):
        return getattr(self.model, name)

    def sample(self, noise, text, negative, *, num_steps, watch, **settings):
        self.given.append(noise.clone())
        for row in range(num_steps + 1):
            watch(row, noise)
        return noise


@pytest.mark.parametrize("workers", [1, 2, 3, 5])
@pytest.mark.parametrize("chunk", [1, 2, 3, 4, 7, 16])
def test_no_split_among_workers_and_chunks_repeats_a_noise(config, wan, workers, chunk):
    """A public trainer seeded each chunk alike, trained on every noise four times and collapsed."""
    settings = config(f"rollout.batch_size={chunk}", "rollout.per_prompt=5")
    prompts = [f"prompt {i}" for i in range(7)]
    sampling = start_sampling(settings, Recorder(wan), prompts, engine="module", network="x")
    made = []
    for worker in range(workers):
        for first in range(worker * chunk, 35, workers * chunk):
            made += sample_rows(sampling, range(first, min(first + chunk, 35)))
    latents = torch.stack([rollout.latents.flatten() for rollout in sorted(made, key=lambda rollout: rollout.id)])
    assert len(latents) == 35 and len({tuple(row[:8].tolist()) for row in latents}) == 35
    whole = keyed_randn((35, *made[0].latents.shape), NoiseKey(0, torch.arange(35), 1, Stream.ROLLOUT), device=CPU)
    assert torch.equal(latents, whole.flatten(1)), "a rollout's noise depends on its company"
    assert all(len(given) == chunk for given in sampling.model.given)


def test_another_round_and_another_seed_have_other_noise(config, wan):
    seen = []
    for more in ((), ("rollout.round=1",), ("rollout.seed=1",)):
        sampling = start_sampling(config(*more), Recorder(wan), ["p"], engine="module", network="x")
        seen.append(sample_rows(sampling, range(1))[0].latents)
    assert not any(torch.equal(a, b) for a, b in ((seen[0], seen[1]), (seen[0], seen[2]), (seen[1], seen[2])))


def test_another_batch_or_backend_agrees_to_the_rounding_of_fp32(store, half_wan, config):
    """Across regimes: batch 1 instead of 2. Two thousand roundings of relative size 2⁻²⁴ each are below 2e-4."""
    other = start_sampling(config("rollout.batch_size=1"), half_wan, [store[0].prompt], engine="module", network="x")
    again = sample_rows(other, range(1))[0]
    torch.testing.assert_close(again.latents, store[0].latents, rtol=2e3 * 2**-24, atol=2e3 * 2**-24)


IN_ENGINE = """
import json, sys, torch
from pathlib import Path
from alignkit.apo.rollouts import roll_out
from alignkit.config import load_config
from alignkit.models import load_model
from alignkit.training.distributed import on_main, start_process
from alignkit.training.engine import load_network, start_policy
from alignkit.training.weights import open_start

process = start_process()
torch.set_num_threads(1)
config = load_config(sys.argv[1], sys.argv[4:])
model = load_model(config.model, with_transformer=False)
start = open_start(config, model)
network, model.attention = load_network(config, process, model, start)
model.transformer = network
policy = start_policy(config, process, network, start)
prompts = json.loads(sys.argv[3])
store = roll_out(
    config, process, model, policy, prompts, Path(sys.argv[2]), network="step 0", show=False,
    agree=lambda look: on_main(process, look),
)
assert policy.training and len(store) == len(prompts) * config.rollout.per_prompt
if process.main:
    print(json.dumps(store[0].origin.recipe["regime"]))
"""


def run_in_engine(start_command, arguments, processes):
    from alignkit.training.distributed import free_port

    shared = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1"}
    shared["MASTER_PORT"] = str(free_port())
    children = [
        start_command(*arguments, code=IN_ENGINE, env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(processes)
    ]
    answers = [child.communicate() for child in children]
    assert [child.returncode for child in children] == [0] * processes, answers[0][1][-2000:] + answers[-1][1][-2000:]
    return json.loads(answers[0][0].splitlines()[-1])


def test_a_training_engine_samples_with_its_own_weights(store, rollout_overrides, config_file, start_command, tmp_path):
    """Under ZeRO-3, on two processes with blocks of five and of four rollouts: nobody waits for forwards that the other
    does not run, and the rollouts are those of the plain module but for rounding, since the weights are."""
    settings = rollout_overrides(tmp_path / "run", "deepspeed.preset=zero3", "rollout.block_size=5")
    prompts = [store[row].prompt for row in (0, 3, 6)]
    regime = run_in_engine(start_command, [config_file, tmp_path / "made", json.dumps(prompts), *settings], 2)
    assert regime["engine"] == "zero3" and regime["batch"] == 2
    made = RolloutStore(tmp_path / "made")
    assert made.ids == store.ids and [one.origin.key for one in made] == [one.origin.key for one in store]
    assert not list((tmp_path / "made").rglob("*.safetensors")), "weights were copied"
    for ours, theirs in zip(made, store, strict=True):
        assert ours.path_rows == theirs.path_rows
        torch.testing.assert_close(ours.latents, theirs.latents, rtol=2e3 * 2**-24, atol=2e3 * 2**-24)


# --- refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ("rollout.num_inference_steps=5", "steps"),
        ("rollout.solver=model", "solver"),
        ("rollout.guidance_scale=1.0", "guidance"),
        ("rollout.negative_prompt=grey", "negative_prompt"),
        ("rollout.seed=4", "seed"),
        ("rollout.batch_size=3", "regime.batch"),
        ("noise.path_steps=2", "states"),
        ("data.num_frames=17", "regime.latents"),
    ],
)
def test_rollouts_made_otherwise_are_not_mixed(made_rollouts, config, change, name):
    shutil.copytree(made_rollouts / "rollouts", rollouts_folder(config()))
    before = blocks(rollouts_folder(config()))
    more = ["noise.path_between=false"] if "solver" in change else []
    with pytest.raises(DataError, match=rf"rollouts made with {name} = "):
        build_rollouts(config(change, *more), CPU, show=False)
    assert blocks(rollouts_folder(config())) == before


def test_rollouts_of_other_weights_versions_and_prompts_are_not_mixed(made_rollouts, config, tmp_path, monkeypatch):
    shutil.copytree(made_rollouts / "rollouts", rollouts_folder(config()))
    monkeypatch.setattr(apo, "versions", lambda: {"torch": "9.9"})
    with pytest.raises(DataError, match="made with version of torch = "):
        build_rollouts(config(), CPU, show=False)
    monkeypatch.undo()
    other = tmp_path / "other"
    model = config().model
    shutil.copytree(load_model(model, with_transformer=False, with_encoders=False).local_folder(), other)
    (weights,) = (other / "transformer").glob("*.safetensors")
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    with pytest.raises(DataError, match="rollouts made with model = "):
        build_rollouts(config(f"model.path={other}"), CPU, show=False)
    (tmp_path / "p.txt").write_text("another prompt\na second\nand a third\n")
    with pytest.raises(DataError, match="another prompt"):
        build_rollouts(config(f"data.prompts={tmp_path / 'p.txt'}"), CPU, show=False)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (("rollout.solver=model",), "noise.path_between.*UniPC"),
        (("noise.path_steps=7",), r"noise.path_steps: 7, but only 6"),
        (("noise.interval=[0.0,0.01]",), "noise.interval"),
        (("rollout.dynamic_guidance=true",), "dynamic_guidance"),
        (("data.height=50",), "data.height"),
    ],
)
def test_settings_are_refused_before_weights_load(config, monkeypatch, changes, words):
    def no_weights(section, **options):
        assert not options.get("with_transformer", True), "weights were loaded"
        return load_model(section, **options)

    monkeypatch.setattr(apo, "load_model", no_weights)
    with pytest.raises(ConfigError, match=words) as caught:
        build_rollouts(config(*changes), CPU, show=False)
    assert "\n" not in str(caught.value)


def test_noise_of_a_sampler_that_drops_it_is_refused(cogvideox_folders, tmp_path, config, build_cogvideox):
    from alignkit.objectives.states.checks import check_noise

    folder = tmp_path / "dpm"
    shutil.copytree(cogvideox_folders["5b"], folder)
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"_class_name": "CogVideoXDPMScheduler"}))
    keys = [
        f"model.path={folder}",
        "model.family=cogvideox",
        "model.max_sequence_length=24",
        "noise.path_between=false",
    ]
    for solver, source, refused in (
        ("model", "initial", True),
        ("first_order", "initial", False),
        ("model", "path", False),
    ):
        settings = config(*keys, f"rollout.solver={solver}", f"noise.source={source}")
        model = load_model(settings.model, with_transformer=False, with_encoders=False)
        if refused:
            with pytest.raises(ConfigError, match=r"noise.source: 'initial'.*DPM"):
                check_noise(settings, model)
        else:
            check_noise(settings, model)


def test_the_command_says_what_is_wrong_in_one_line(command, config_file, rollout_overrides, tmp_path):
    (tmp_path / "p.txt").write_text("a\n\nb\n")
    result = command("rollout", config_file, *rollout_overrides(tmp_path / "run"), f"data.prompts={tmp_path / 'p.txt'}")
    assert result.returncode == 2 and not (tmp_path / "run").exists()
    assert result.stderr.splitlines() == [
        f"alignkit: data.prompts: {tmp_path / 'p.txt'}:2: the prompt is empty; delete the line or write one"
    ]
