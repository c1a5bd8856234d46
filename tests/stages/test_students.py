"""A few-step student: distilled from its teacher's paths, and held beside it."""

import math
import shutil
from dataclasses import replace

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from alignkit.apo.students import teacher_rows
from alignkit.config import ModelSection, Sampler, dump_config, load_config
from alignkit.errors import AlignkitError, ConfigError, DataError
from alignkit.evaluation.samples import sample_latents
from alignkit.models import family_module, load_model, shipped_model
from alignkit.objectives.distillation import distillation_states, with_next_steps
from alignkit.objectives.laws import start_law
from alignkit.objectives.states import States
from alignkit.schedules import common_rows, one_step, split_states
from alignkit.stages import stage_configs, students
from alignkit.stages.chain import run_chain
from alignkit.stages.rounds import rollouts_of_round, round_folder
from alignkit.stores.pairs import PairStore, collate
from alignkit.stores.rollouts import RolloutStore
from alignkit.training.distributed import start_process
from alignkit.training.loop import train_folder
from alignkit.training.masters import MASTERS
from alignkit.training.metrics import read_metrics
from alignkit.training.run import Run
from alignkit.training.teacher import Teacher
from alignkit_kernels import NoiseKey, Stream, keyed_randn, region_errors

DISTILL = "{name: distill, train: {steps: 4}}"
CORRECT = "{name: drift_correction, student: {ratio: 2}, online: {every: 4}, train: {steps: 6}}"
FAST = ("train.learning_rate=1e-3", "train.checkpointing=none", "deepspeed.preset=zero2")
SMALL = (
    "data.rollouts=null", "data.pairs=null", "noise={}", "rollout={per_prompt: 1, block_size: 2}",
    "student.num_inference_steps=2", "sample.num_inference_steps=4", "sample.guidance_scale=2.0",
)  # fmt: skip


@pytest.fixture
def process():
    return start_process()


@pytest.fixture
def chain(rollout_overrides, config_file, tmp_path):
    """`chain("run", STAGES, "key=value")`: the configuration of a chain with a student of two steps."""

    def make(name, stages, *more):
        given = rollout_overrides(tmp_path / name, *SMALL, *FAST, "train.checkpoint_every=2")
        return load_config(config_file, [*given, f"stages=[{stages}]", *more])

    return make


def stage_of(config, number):
    return stage_configs(config)[number][1]


def metrics_of(config, number):
    return read_metrics(train_folder(stage_of(config, number)) / "metrics.jsonl")


def masters(config, number):
    return load_file(train_folder(stage_of(config, number)) / MASTERS)


@pytest.fixture(scope="module", params=["wan", "cogvideox"])
def model(request):
    section = ModelSection(family=request.param, max_sequence_length=64)
    return load_model(section, with_transformer=False, with_encoders=False)


def test_the_target_takes_a_first_order_solver_from_state_to_state(model):
    """In both parameterisations, from pure noise and to the clean end: the one formula of the distillation."""
    schedule = model.schedule(4)
    shape = model.latent_shape(9, 32, 32)
    for row in range(4):
        key = NoiseKey(3, torch.arange(2), row, Stream.ROLLOUT)
        here, there = (keyed_randn((2, *shape), replace(key, draw=draw)) for draw in (0, 9))
        ends = schedule.coefficients[row : row + 2, :2].expand(2, 2, 2)
        clean, noise = split_states(here, there, ends)
        _, _, c, d = schedule.coefficients[row].tolist()
        arrived = one_step(here, c * noise + d * clean, *schedule.coefficients[row : row + 2])
        size = max(clean.abs().max().item(), noise.abs().max().item())  # what rounding is relative to
        torch.testing.assert_close(arrived, there, rtol=0, atol=8 * size * 2**-24)  # eight fp32 operations


def test_few_steps_are_found_among_many_and_others_are_not(model):
    many = model.schedule(20)
    assert common_rows(model.schedule(4), many) == (0, 5, 10, 15)
    assert common_rows(many, many) == tuple(range(20))
    assert common_rows(model.schedule(3), many) is None


def test_a_teachers_steps_that_leave_some_of_the_students_out_are_refused_with_a_way_out(chain):
    config = chain("run", DISTILL, "student.num_inference_steps=3")
    network = load_model(config.model, with_transformer=False, with_encoders=False)
    with pytest.raises(ConfigError, match=r"the 3 steps are no subset of the teacher's 4; .* for example to 6"):
        teacher_rows(stage_of(config, 0), network)


@pytest.fixture(scope="module")
def run(rollout_overrides, config_file, tmp_path_factory):
    """A chain of a student, done."""
    out = tmp_path_factory.mktemp("student") / "run"
    given = rollout_overrides(out, *SMALL, *FAST, "train.checkpoint_every=2")
    config = load_config(config_file, [*given, f"stages=[{DISTILL}, {CORRECT}]"])
    assert run_chain(config, start_process())
    return config


def test_the_teacher_is_what_the_stage_starts_from_sampled_as_usual(run):
    stage = stage_of(run, 0)
    rollouts = RolloutStore(rollouts_of_round(stage.output.dir, 0))
    recipe = rollouts[0].origin.recipe
    assert (recipe["solver"], recipe["steps"], recipe["guidance"]) == ("model", 4, 2.0)
    base = load_model(run.model)
    again = base.sample(
        keyed_randn((1, *rollouts[0].latents.shape), NoiseKey(*_words(rollouts[0].origin.key))),
        base.pad_text(base.encode_text([rollouts[0].prompt])),
        base.pad_text(base.encode_text([run.sample.negative_prompt])),
        num_steps=4,
        guidance=2.0,
    )
    # a plain network instead of the engine: four guided steps, a thousand roundings of 2⁻²⁴ each
    torch.testing.assert_close(again[0], rollouts[0].latents, rtol=1e-4, atol=1e-4)
    pairs = PairStore(round_folder(stage.output.dir, 0) / "pairs" / "train")
    assert pairs[0].path_rows == (0, 1) and torch.equal(pairs[0].winner, rollouts[0].latents)
    assert torch.equal(pairs[0].path_w.states[1], rollouts[0].path.states[1]) and rollouts[0].path_rows == (0, 2)


def _words(key):
    return key[0], torch.tensor([key[1]]), key[2], key[3]


def test_distilling_trains_towards_the_teachers_next_state(run):
    """The logged error at the first step is the one computed from the stored states by hand."""
    stage = stage_of(run, 0)
    pairs = PairStore(round_folder(stage.output.dir, 0) / "pairs" / "train")
    base = load_model(stage.model)
    law = start_law(stage, base)
    batch = collate([pairs[row] for row in range(len(pairs))])
    taught, states = distillation_states(base, law, batch, torch.zeros(len(pairs), dtype=torch.int64), base.dtype)
    predicted = family_module("wan").predict(base.transformer, states.inputs, states.timesteps, states.text)
    for i, row in enumerate(states.rows.tolist()):
        path = pairs[i].path_w
        here, there = (state.double() for state in (*path.states, pairs[i].winner)[row : row + 2])
        (a, s), (b, t) = law.schedule.coefficients[row : row + 2, :2].tolist()
        clean, noise = torch.linalg.solve(
            torch.tensor([[a, s], [b, t]]).double(), torch.stack([here, there]).flatten(1)
        )
        wanted = (predicted[i].double().flatten() - (noise - clean)).square().mean()
        sums = region_errors(predicted[i : i + 1], taught.winner[i : i + 1], states.coefficients[i : i + 1],
                             states.noise_w.__class__(states.noise_w.state[i : i + 1]))  # fmt: skip
        assert (sums.error / sums.count).item() == pytest.approx(
            wanted.item(), rel=1e-5
        )  # fp32 states, some ten roundings
    seen = metrics_of(run, 0)
    assert [set(row) & {"rewards/margins", "error_l"} for row in seen] == [set()] * 4, "nothing is compared"


def test_correction_alternates_and_pairs_are_of_one_noise(run):
    seen = metrics_of(run, 1)
    assert [row["distils"] for row in seen] == [0, 0, 1, 0, 0, 1], "two that compare to one that distils"
    assert ["rewards/margins" in row for row in seen] == [True, True, False, True, True, False]
    stage = stage_of(run, 1)
    for number, at in ((0, 0), (1, 4)):
        rollouts = RolloutStore(rollouts_of_round(stage.output.dir, number))
        assert rollouts[0].origin.recipe["network"].endswith(f"at step {at}")
        assert (rollouts[0].origin.recipe["solver"], rollouts[0].origin.recipe["steps"]) == ("first_order", 2)
        pairs = PairStore(round_folder(stage.output.dir, number) / "pairs" / "train")
        for pair, winner, loser in zip(pairs, *pairs.origins, strict=True):
            assert winner.key == loser.key and winner.recipe["guidance"] == 2.0 and loser.recipe["guidance"] == 1.0
            assert torch.equal(pair.path_w.states[0], pair.path_l.states[0]), "the same starting noise"
            assert not torch.equal(pair.winner, pair.loser)


def test_high_noise_comes_first(chain, process, monkeypatch):
    drawn, real = [], Run.states

    def states(run, batch, epochs):
        found = real(run, batch, epochs)
        drawn.append(set(found.rows.tolist()))
        return found

    monkeypatch.setattr(Run, "states", states)
    steps = "{name: drift_correction, student: {ratio: 9, high_noise_first: 0.5}, train: {steps: 8}}"
    assert run_chain(chain("run", f"{DISTILL}, {steps}"), process)
    per_step = len(drawn) // 8
    early, late = drawn[: 4 * per_step], drawn[4 * per_step :]
    assert set().union(*early) == {0} and set().union(*late) == {0, 1}


def test_the_exported_student_samples_in_diffusers_as_it_does_here(run):
    export = run.output.dir / "export"
    pipeline = DiffusionPipeline.from_pretrained(export)
    pipeline.set_progress_bar_config(disable=True)
    student = load_model(run.model.model_copy(update={"path": str(export)}))
    sampler = run.few_step_sampler
    assert (sampler.num_steps, sampler.guidance, sampler.solver) == (2, 1.0, "first_order")
    shape = student.latent_shape(run.data.num_frames, run.data.height, run.data.width)
    ours = sample_latents(run, student, ["a red circle"], [5], 0, shape, sampler)
    noise = keyed_randn((1, *shape), NoiseKey(0, torch.tensor([5]), 0, Stream.ROLLOUT))
    theirs = pipeline(
        "a red circle", height=run.data.height, width=run.data.width, num_frames=run.data.num_frames,
        num_inference_steps=2, guidance_scale=1.0, latents=noise, output_type="latent",
        max_sequence_length=run.model.max_sequence_length,
    ).frames  # fmt: skip
    # UniPC's first order goes by logarithms of signal to noise: some ten roundings apart, which each of two forwards
    # of a few hundred operations magnifies: a thousand of 2⁻²⁴
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)


def test_broken_in_a_round_and_resumed_the_student_is_the_same(run, chain, process, monkeypatch):
    broken = chain("broken", f"{DISTILL}, {CORRECT}")

    class Killed(Exception):
        pass

    for name, place, count in (("build_taught", students, 1), ("step", Run, 6), ("build_taught", students, 1)):
        calls, real = [], getattr(place, name)

        def dying(*given, _calls=calls, _real=real, _count=count, **options):
            _calls.append(1)
            if len(_calls) == _count:
                raise Killed
            return _real(*given, **options)

        with monkeypatch.context() as patch:
            patch.setattr(place, name, dying)
            with pytest.raises(Killed):
                run_chain(broken, process)
    assert run_chain(broken, process)
    for number in (0, 1):
        assert metrics_of(broken, number) == metrics_of(run, number)
        ours, theirs = masters(broken, number), masters(run, number)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("family", ["wan", "cogvideox"])
def test_the_teacher_goes_on_from_the_students_own_states(family):
    """Pairs at different steps in one batch, against walks of one state at a time."""
    section = ModelSection(family=family, max_sequence_length=64)
    model, module = load_model(section), family_module(family)
    teacher, student = model.schedule(6), model.schedule(2)
    shape = model.latent_shape(9, 32, 32)
    at = torch.tensor([1, 0])
    own = keyed_randn((4, *shape), NoiseKey(1, torch.arange(4), 0, Stream.ROLLOUT))
    text, negative = (model.pad_text(model.encode_text([words])) for words in ("a red circle", "blurred"))
    states = States(
        own, student.timesteps[at].float().repeat(2), text.repeat(4, 1, 1), student.coefficients[at], None, rows=at
    )
    sampler = Sampler("model", 6, 3.0, False, "blurred")
    found = Teacher(model, model.transformer, sampler, (0, 3), 1.0)
    targets = found.targets(states, model.encode_text(["blurred"])[0])
    for i, row in enumerate(at.tolist()):
        here = state = own[2 + i : 3 + i]
        with torch.no_grad():
            for step in range(3 * row, 3 * row + 3):
                timestep = teacher.timesteps[step].float()[None]
                guided = module.guided(model.transformer, state, timestep, text, negative, 3.0)
                state = one_step(state, guided, *teacher.coefficients[step : step + 2])
        arrived = one_step(here, targets[i : i + 1], *student.coefficients[row : row + 2])
        rounded = 2e3 * 2**-24  # another batch: two thousand roundings
        torch.testing.assert_close(arrived, state, rtol=rounded, atol=rounded)
    exact = found.distance(targets, states, model.encode_text(["blurred"])[0])
    assert exact.shape == (2,) and exact.max() < 1e-6 < found.distance(targets + 0.1, states, negative[0]).min()


def test_beside_the_teacher_on_its_own_states_instead(chain, process):
    """λ: the teacher's network is there, no step distils, and the distance is part of the loss."""
    weighed = "{name: drift_correction, student: {weight: 2.0}, train: {steps: 3, learning_rate: 0.0}}"
    config = chain("run", f"{DISTILL}, {weighed}")
    assert run_chain(config, process)
    for row in metrics_of(config, 1):
        assert row["teacher/distance"] > 1e-4 and not row["distils"]
        assert row["loss"] == pytest.approx(math.log(2) + 2 * row["teacher/distance"], rel=1e-12)  # means in fp64


def test_a_student_that_makes_what_its_teacher_does_leaves_nothing_to_compare(chain, process):
    """DDIM is of first order: without guidance and in as many steps it is the student's own sampler."""
    same = ("sample.guidance_scale=1.0", "sample.num_inference_steps=2", "model.family=cogvideox", "model.path=tiny")
    config = chain("run", f"{{name: distill, train: {{steps: 1, learning_rate: 0.0}}}}, {CORRECT}", *same)
    with pytest.raises(DataError, match="holds no pairs; the reasons are in"):
        run_chain(config, process)
    assert metrics_of(config, 0)[0]["loss"] < 1e-9, "and nothing to distil"


def test_a_student_from_elsewhere_has_its_teacher_by_name(chain, process, monkeypatch, wan):
    opened, real = [], students.second_network
    monkeypatch.setattr(students, "second_network", lambda *given: opened.append(1) or real(*given))
    config = chain("run", CORRECT, f"student.teacher={shipped_model('wan')}")
    assert run_chain(config, process)
    assert len(opened) == 1, "of two rounds the first: its rollouts are there then"
    stage = stage_of(config, 0)
    teacher = RolloutStore(stage.output.dir / "teacher")
    assert teacher[0].origin.recipe["network"] == wan.fingerprint()
    assert all(row["error_w"] > 0 for row in metrics_of(config, 0))


def test_two_processes_under_zero3_train_the_student_of_one(chain, process, command):
    """With the teacher in memory, partitioned too."""
    stages = f"{DISTILL}, {{name: drift_correction, student: {{weight: 1.0}}, train: {{steps: 2}}}}"
    one, two = (chain(name, stages, "deepspeed.preset=zero3") for name in ("one", "two"))
    assert run_chain(one, process)
    file = two.output.dir.parent / "two.yaml"
    file.write_text(dump_config(two))
    result = command("train", file, "--nproc", "2")
    assert result.returncode == 0, result.stderr
    for number in (0, 1):
        for x, y in zip(metrics_of(one, number), metrics_of(two, number), strict=True):
            assert x["error_w"] == pytest.approx(y["error_w"], rel=2 * 2e3 * 2**-24)  # as in test_rounds.py


@pytest.mark.parametrize(
    ("stages", "more", "words"),
    [
        (CORRECT, (), "stage drift_correction: student.teacher: not set, and no stage before this one is distill"),
        (f"{DISTILL}, {CORRECT}", ("student.teacher=x",), "stage distill: student.teacher: is what the stage starts"),
        (DISTILL, ("data.prompts=null",), "stage distill: data.prompts or data.videos: not set"),
        (DISTILL, ("student.num_inference_steps=3",), "student.num_inference_steps: the 3 steps are no subset"),
    ],
)
def test_what_a_student_needs_is_said_before_weights_are_read(chain, process, monkeypatch, stages, more, words):
    monkeypatch.setattr("alignkit.training.loop.open_start", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(ConfigError, match=words):
        run_chain(chain("run", stages, *more), process)


def test_a_preference_step_has_the_students_own_targets(run):
    """Of both sides the prediction that takes it to its own next state, not to its video."""
    stage = stage_of(run, 1)
    pairs = PairStore(round_folder(stage.output.dir, 0) / "pairs" / "train")
    base = load_model(stage.model, with_transformer=False, with_encoders=False)
    law, batch = start_law(stage, base), collate([pairs[0]] * 8)
    epochs = torch.arange(8)
    aimed = with_next_steps(law, batch, epochs)
    rows = law.draw(batch.ids, epochs, batch.path_rows).rows.tolist()
    assert set(rows) == {0, 1}
    for i, row in enumerate(rows):
        a, s, c, d = law.schedule.coefficients[row].tolist()
        sides = ((aimed.winner, pairs[0].winner, pairs[0].path_w), (aimed.loser, pairs[0].loser, pairs[0].path_l))
        for clean, video, path in sides:
            here, there = (*path.states, video)[row : row + 2]
            noise = (here - a * clean[i]) / s
            arrived = one_step(here, c * noise + d * clean[i], *law.schedule.coefficients[row : row + 2])
            size = max(x.abs().max().item() for x in (clean[i], noise))  # what rounding is relative to
            torch.testing.assert_close(arrived, there, rtol=0, atol=8 * size * 2**-24)  # eight fp32 operations
            assert torch.allclose(clean[i], video) == (row == 1), "the last step's next state is the video"


def test_rounds_around_a_distill_stage_are_not_its_own(chain, process):
    """It has one, of the teacher's rollouts, however long it trains and however old online pairs may get."""
    assert run_chain(chain("run", DISTILL, "online={every: 1, staleness: 2, queue: 1}"), process)


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        (
            f"{DISTILL}, {CORRECT.replace('online', 'rollout: {per_prompt: 2}, online')}",
            "rollout.per_prompt: 2, and 1 in",
        ),
        (
            f"{DISTILL}, {CORRECT.replace('online', 'rollout: {seed: 3}, online')}",
            "rollout.seed: 3, and 0 in the stage",
        ),
        (f"{DISTILL}, {CORRECT.replace('{ratio: 2}', '{num_inference_steps: 1}')}", "num_inference_steps: 1, and 2 in"),
        (CORRECT.replace("{ratio: 2}", "{teacher: /no/such/folder}"), "no such folder"),
        (CORRECT.replace("{ratio: 2}", "{teacher: OTHER}"), "student.teacher: .* has another VAE than the student"),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused_before_anything_trains(
    chain, process, monkeypatch, tmp_path, stages, words
):
    monkeypatch.setattr("alignkit.stages.chain.train", lambda *_: pytest.fail("trained"))
    other = shutil.copytree(shipped_model("wan"), tmp_path / "other")
    weights = next((other / "vae").glob("*.safetensors"))
    save_file({name: value + 1 for name, value in load_file(weights).items()}, weights)
    with pytest.raises(AlignkitError, match=words):
        run_chain(chain("run", stages.replace("OTHER", str(other))), process)


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        ("{name: distill, rollout: {guidance_scale: 3}}", r"entry 1 \(distill\): rollout.guidance_scale: .* 1.0"),
        ("{name: distill, objective: {name: dpo}}", r"objective.name: this stage trains with 'sft'"),
        ("{name: drift_correction, noise: {source: shared}}", r"noise.source: this stage trains with 'path'"),
        ("{name: drift_correction, student: {ratio: 2, weight: 1.0}}", "ratio: is not read with a weight"),
        ("{name: distill, train: {caption_dropout: 0.1}}", "train.caption_dropout: this stage trains with 0.0"),
        (f"{DISTILL}, {{name: online}}", r"entry 2 \(online\): a student, which distill makes, is trained further by"),
        ("{name: sft, student: {ratio: 2}}", r"entry 1 \(sft\): student: is read by distill and drift_correction"),
    ],
)
def test_settings_that_a_students_stage_does_not_read_are_refused(chain, stage, words):
    with pytest.raises(ConfigError, match=words):
        stage_configs(chain("run", stage))


def test_the_first_prompts_are_enough_for_correction_and_more_than_the_teacher_has_are_not(run, chain, process):
    fewer = chain("fewer", f"{DISTILL}, {CORRECT.replace('every: 4', 'every: 4, prompts: 2')}")
    assert run_chain(fewer, process)
    assert {row["online/pairs"] for row in metrics_of(fewer, 1)} == {2}
    more = chain("more", f"{DISTILL.replace('train', 'online: {prompts: 2}, train')}, {CORRECT}")
    with pytest.raises(
        ConfigError, match=r"online.prompts: its 3 prompts are not the first ones of the 2 of the stage"
    ):
        run_chain(more, process)


def test_a_teacher_whose_rollouts_are_gone_or_changed_is_said(chain, process):
    done = chain("gone", DISTILL)
    assert run_chain(done, process)
    shutil.rmtree(rollouts_of_round(stage_of(done, 0).output.dir, 0))
    with pytest.raises(DataError, match="the teacher's rollouts, beside which the student is put, cannot be read; put"):
        run_chain(chain("gone", f"{DISTILL}, {CORRECT}"), process)
    other = f"student.teacher={shipped_model('wan')}"
    once = chain("elsewhere", CORRECT.replace("steps: 6", "steps: 1"), other)
    assert run_chain(once, process)
    folder = stage_of(once, 0).output.dir
    shutil.rmtree(folder / "rounds"), shutil.rmtree(folder / "train")
    changed = chain("elsewhere", CORRECT, other, "sample.guidance_scale=3.0")
    with pytest.raises(DataError, match=r"teacher: its rollouts were sampled with guidance = 2.0, now it is 3.0"):
        run_chain(changed, process)
