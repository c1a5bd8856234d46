"""Configuration: one clear line for every mistake, before anything slow starts."""

import json
import os
import subprocess
import sys

import pytest

from alignkit.config import OBJECTIVES, ObjectiveSection, dump_config, load_config, shipped_config, shipped_configs
from alignkit.config.yaml_text import read_yaml
from alignkit.errors import ConfigError
from alignkit.stages import stage_configs


def write(tmp_path, text):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    return file


GOOD = "output: {dir: out}\n"


def test_anchors_and_merge_keys_mean_what_they_mean_in_yaml():
    text = GOOD + "x: &a {steps: 7, seed: 3}\ntrain: {<<: *a, seed: 4}\n"
    assert read_yaml(text)["train"] == {"steps": 7, "seed": 4}


def test_what_answers_a_refusal_is_not_kept_with_the_run(tmp_path):
    """It answered the next one, too, where the settings in a run's folder were given as a file."""
    answers = "restart: true, reshape: true, accept: [train.learning_rate]"
    text = GOOD + f"train: {{{answers}}}\nstages: [{{name: sft, train: {{{answers}}}}}]"
    config = load_config(write(tmp_path, text))
    (tmp_path / "kept.yaml").write_text(dump_config(config))
    kept = load_config(tmp_path / "kept.yaml")
    assert (kept.train.restart, kept.train.reshape, kept.train.accept) == (False, False, ())
    assert kept.stages[0].train == {}
    assert kept.model_copy(update={"train": config.train, "stages": config.stages}) == config


def test_a_locale_of_few_characters_changes_no_word_of_a_configuration(tmp_path):
    """Files were read in the locale's encoding, and what it lacks ended a command that prints in a traceback."""
    words = "模糊, café"
    (tmp_path / "run.yaml").write_text(f"{GOOD}pairs: {{negative_prompt: {words!r}}}", encoding="utf-8")
    locale = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}

    def out(*command):
        asked = [sys.executable, *command]
        return subprocess.run(asked, cwd=tmp_path, env=os.environ | locale, capture_output=True, check=True).stdout

    read = "from alignkit.config import load_config; print(ascii(load_config('run.yaml').pairs.negative_prompt))"
    assert out("-c", read).decode().strip() == ascii(words)
    assert out("-m", "alignkit", "init", "wan2.1-14b") == shipped_config("wan2.1-14b-localdpo.yaml").read_bytes()
    assert out("-m", "alignkit", "configs").isascii()


@pytest.mark.parametrize(
    ("text", "overrides", "words"),
    [
        (
            GOOD + "train: {learning_rat: 1e-6}",
            [],
            ["run.yaml", "train.learning_rat", "unknown key", "'learning_rate'"],
        ),
        (GOOD + "train: {gradient_checkpointing: true}", [], ["train", "train.checkpointing now: full for true"]),
        (GOOD + "train: {checkpointing: some}", [], ["train.checkpointing", "'full', 'selective' or 'none'", "'some'"]),
        (GOOD + "train: {checkpointing: selective, compile: true}", [], ["checkpointing", "train.compile"]),
        (GOOD + "trainn: {}", [], ["trainn", "unknown key", "'train'"]),
        (GOOD + "train: {steps: many}", [], ["train.steps", "integer", "'many'"]),
        (GOOD + "train: {steps: 0}", [], ["train.steps", "greater than or equal to 1", "0"]),
        (GOOD + "pairs: {mask: {shap: x}}", [], ["pairs.mask.shap", "unknown key", "'shape'"]),
        (GOOD + "pairs: {mask: {files: m, moving: 0.0}}", [], ["mask.moving is not read where mask.files"]),
        (GOOD + "pairs: {strengths: [60]}", [], ["pairs", "strengths", "50"]),
        (GOOD + "pairs: {strengths: [10]}", [], ["pairs.strengths", "0.2", "[0.75, 0.9]"]),
        (GOOD + "objective: {name: dpoo}", [], ["objective.name", "'region_dpo'", "'dpoo'"]),
        (GOOD + "objective: {name: dpo, weight_region: 0.5}", [], ["weight_region", "'dpo'", "local_dpo"]),
        (GOOD + "objective: {name: dpo, strength_range: [0.5, 0.9]}", [], ["strength_range", "'dpo'"]),
        (GOOD + "objective: {name: ipo, label_smoothing: 0.1}", [], ["label_smoothing", "'ipo'", "robust_dpo"]),
        (GOOD + "objective: {label_smoothing: 0.1}", [], ["label_smoothing", "'local_dpo'"]),
        (GOOD + "objective: {name: sft, loser_safeguard: 0}", [], ["loser_safeguard", "'sft'"]),
        (GOOD + "objective: {name: sft, beta: 2}", [], ["beta", "'sft'"]),
        (GOOD + "objective: {name: dpo, label_smoothing: 0.5}", [], ["objective.label_smoothing", "less than 0.5"]),
        (GOOD + "objective: {name: dpo, loser_safeguard: 2}", [], ["objective.loser_safeguard", "less than or equal"]),
        (GOOD + "objective: {weight_region: 0, weight_global: 0, weight_sft: 0}", [], ["weight_sft", "all 0"]),
        (GOOD + "evaluation: {positions: []}", [], ["evaluation.positions", "at least 1"]),
        (GOOD + "sample: {seeds: []}", [], ["sample.seeds", "at least 1"]),
        ("train: {}", [], ["output", "missing"]),
        (GOOD + "train: {compile: 1.0}", [], ["train.compile", "boolean", "1.0"]),
        (GOOD + "pairs: {dynamic_guidance: t}", [], ["pairs.dynamic_guidance", "boolean", "'t'"]),
        (GOOD + "rollout: {dynamic_guidance: 1}", [], ["rollout.dynamic_guidance", "boolean"]),
        (GOOD + "objective: {beta: ５０}", [], ["objective.beta", "number"]),
        (GOOD + "train: {learning_rate: '1_0e-6'}", [], ["train.learning_rate", "number", "'1_0e-6'"]),
        (GOOD + "objective: {strength_range: [false, true]}", [], ["strength_range", "number"]),
        (GOOD + "objective: {strength_range: [-1, 5]}", [], ["strength_range", "greater than or equal to 0"]),
        (GOOD + "ranker: {endpoint: {url: 'http://x/v1', model: m, frames: '8'}}", [], ["frames", "integer"]),
        (GOOD + "train: {lora: {targets: [to_q, to_q]}}", [], ["train.lora.targets", "to_q stands there twice"]),
        (GOOD + "train: {lora: {targets: ['']}}", [], ["train.lora.targets", "should match"]),
        ("output: {dir: ''}", [], ["output.dir", "is no path"]),
        (GOOD + "data: {videos: ''}", [], ["data.videos", "is no path"]),
        ('output: {dir: "a\\0b"}', [], ["output.dir", "is no path"]),
        ("{" * 3000, [], ["not valid YAML"]),
        (GOOD, ["train=" + "{" * 3000], ["override", "not valid YAML"]),
        (GOOD + "model: {path: ./out/export}", [], ["model.path", "out/export", "replaces", "another output.dir"]),
        (GOOD + "model: {lora: [out/export-ema]}", [], ["model.lora", "replaces"]),
        (GOOD + "student: {teacher: ./out/../out/export}", [], ["student.teacher", "replaces"]),
        ("- a\n- b", [], ["sections", "list"]),
        ("a: [", [], ["not valid YAML"]),
        (GOOD + "objective: {beta: automatic}", [], ["objective.beta: should be a number", "or auto, got 'automatic'"]),
        (GOOD + "objective: {beta: 0}", [], ["objective.beta", "greater than 0"]),
        (GOOD + "objective: {beta: true}", [], ["objective.beta", "or auto", "True"]),
        (GOOD + "objective: {beta: [1]}", [], ["objective.beta", "or auto", "[1]"]),
        (GOOD + "objective: null", [], ["objective: input should be a section of keys", "None"]),
        (GOOD + "objective: {beta_min: 5}", [], ["beta_min", "beta: auto"]),
        (GOOD + "objective: {beta: auto, beta_min: 9, beta_max: 8}", [], ["beta_min is 9", "beta_max, 8"]),
        (GOOD + "objective: {name: dpo, guard_weight: 2}", [], ["guard_weight", "'dpo'", "winner_guarded"]),
        (GOOD + "objective: {name: poly_dpo, poly_alpha: -2}", [], ["objective.poly_alpha", "greater than or equal"]),
        (GOOD + "objective: {name: [dpo]}", [], ["objective.name"]),
        (GOOD + "train: {learning_rate: -1}", [], ["train.learning_rate", "greater than or equal to 0"]),
        (GOOD + "train: {lora: {rnk: 4}}", [], ["train.lora.rnk", "unknown key", "'rank'"]),
        (GOOD + "stages: []", [], ["stages", "at least 1"]),
        (GOOD + "stages: sft", [], ["stages: input should be a list", "'sft'"]),
        (GOOD + "stages: [3]", [], ["stages.0: input should be a section of keys", "got 3"]),
        (GOOD + "stages: [{name: sft, objective: 3}]", [], ["stages.0.objective", "section of keys"]),
        (GOOD + "stages: [sft, localdpo, sft]", [], ["stages", "'sft'", "twice"]),
        (GOOD + "stages: [sft, onlin]", [], ["stages.1.name", "'localdpo'", "'onlin'"]),
        (GOOD + "stages: [{name: sft, trian: {}}]", [], ["stages.0.trian", "'train'"]),
        (GOOD + "stages: [{train: {}}]", [], ["stages.0.name", "missing"]),
        (GOOD, ["train.steps"], ["train.steps", "section.key=value"]),
        (GOOD, ["output.dir.x=1"], ["output.dir.x=1", "not a section"]),
        (GOOD, ["train.stepz=3"], ["train.stepz", "'steps'"]),
        (GOOD, ["train.learning_rate=.nan"], ["train.learning_rate"]),
    ],
)
def test_mistakes_are_named_in_one_line(tmp_path, text, overrides, words):
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, text), overrides)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: cannot read"):
        load_config(tmp_path / "nowhere.yaml")


def test_overrides_win_over_the_file(tmp_path):
    file = write(tmp_path, GOOD + "train: {steps: 5, learning_rate: 1e-6}")
    config = load_config(file, ["train.steps=7", "pairs.strengths=[40]"])
    assert (config.train.steps, config.train.learning_rate, config.pairs.strengths) == (7, 1e-6, (40,))


@pytest.mark.parametrize(
    "objective",
    [
        *({"name": name} for name in OBJECTIVES),
        {"loser_safeguard": 0.0, "weight_region": 0.5},
        {"name": "winner_guarded", "beta": "auto", "beta_min": 3, "guard_exponent": 0, "weight_sft": 7},
        {"name": "region_dpo", "beta": 100, "label_smoothing": 0.1, "loser_safeguard": 0.3},
    ],
)
def test_dumped_configuration_reads_back_equal(tmp_path, objective):
    """A dump holds every key, those that the objective does not read too."""
    config = load_config(
        shipped_config("wan-tiny-localdpo.yaml"), ["data.videos=some/where", f"objective={json.dumps(objective)}"]
    )
    assert load_config(write(tmp_path, dump_config(config))) == config


def test_another_objective_on_the_command_line_begins_with_its_own_defaults(tmp_path):
    file = write(tmp_path, GOOD + "objective: {beta: 200, weight_sft: 100}")
    assert load_config(file, ["objective.name=sft"]).objective == ObjectiveSection(name="sft")
    dpo = load_config(file, ["objective.weight_sft=3", "objective.name=dpo"]).objective
    assert (dpo.beta, dpo.weight_sft) == (5000, 3), "the file's weights were for the file's objective"
    same = load_config(file, ["objective.name=local_dpo"]).objective
    assert (same.beta, same.weight_sft) == (200, 100)


def test_a_beta_on_the_command_line_needs_no_limits_of_an_automatic_one(tmp_path):
    file = write(tmp_path, GOOD + "objective: {beta: auto, beta_min: 20, beta_max: 500, weight_sft: 100}")
    fixed = load_config(file, ["objective.beta=70"]).objective
    assert (fixed.beta, fixed.weight_sft) == (70, 100)
    assert load_config(file, ["objective.beta_max=300"]).objective.beta_max == 300


def test_own_masks_on_the_command_line_replace_the_files_random_ones(tmp_path):
    file = write(tmp_path, GOOD + "pairs: {mask: {area: [0.4, 1.0], blobs: [5, 10]}}")
    assert load_config(file, ["pairs.mask.files=masks"]).pairs.mask.blobs == (1, 5)
    with pytest.raises(ConfigError, match=r"mask\.moving is not read"):
        load_config(file, ["pairs.mask.files=masks", "pairs.mask.moving=0.1"])


def test_strengths_are_held_to_the_range_only_where_it_is_read(tmp_path):
    config = load_config(write(tmp_path, GOOD), ["objective.name=dpo", "pairs.strengths=[10]"])
    assert config.pairs.strengths == (10,)


def test_given_pairs_have_no_strengths_to_be_held_to_a_range(tmp_path):
    settings = ["data.videos=null", "data.pairs=p.csv", "objective.strength_range=[0.1,0.2]"]
    assert load_config(write(tmp_path, GOOD), settings).objective.strength_range == (0.1, 0.2)


def test_every_configuration_in_the_folder_is_valid():
    for name in shipped_configs():
        stage_configs(load_config(name))


def test_a_default_may_differ_between_objectives(tmp_path):
    weights = {
        name: load_config(write(tmp_path, GOOD), [f"objective.name={name}"]).objective.weight_sft
        for name in ("local_dpo", "dpo", "sft")
    }
    assert weights == {"local_dpo": 0.1, "dpo": 0.0, "sft": 0.0}
    dumped = write(tmp_path, dump_config(load_config(write(tmp_path, GOOD))))
    assert load_config(dumped, ["objective.name=sft"]).objective.name == "sft", "what a dump holds is no mistake"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train:\n  steps: 3\ntrain:\n  seed: 1\n", "line 3: the key 'train' stands there twice"),
        ("train:\n  steps: 3\n  seed: 1\n  steps: 4\n", "line 4: the key 'steps' stands there twice"),
        ("stages: [{name: sft, train: {steps: 1, steps: 2}}]\n", "line 1: the key 'steps' stands there twice"),
        ("train:\n  steps: 010\n", "line 2: 010 would be read as another number"),
        ("train:\n  steps: 1:30\n", "line 2: 1:30 would be read as another number"),
        ("train:\n  seed: 3.0\n", "train.seed"),
        ("train:\n  seed: '3'\n", "train.seed"),
        ("train:\n  seed: true\n", "train.seed"),
        ("train:\n  learning_rate: true\n", "train.learning_rate: should be a number, not true or false"),
        ("sample:\n  seeds: [1, 2.0]\n", "sample.seeds.1"),
        ("sample:\n  seeds: [1, 2, 1]\n", "sample.seeds: 1 stands there twice"),
        ("evaluation:\n  positions: [0.1, 0.10]\n", "evaluation.positions: 0.1 stands there twice"),
        ("model:\n  lora: [/a/b, /a/./b]\n", "model.lora: /a/b stands there twice"),
        ("objective:\n  strength_range: [0.9, 0.75]\n", "objective: strength_range must not fall"),
        ("train:\n  lora: {targets: []}\n", "train.lora.targets: "),
        ("train:\n  betas: [0.9, 1.0]\n", "train.betas.1: input should be less than 1, got 1"),
        ("train:\n  seed: 18446744073709551616\n", "train.seed: input should be less than 18446744073709551616"),
    ],
)
def test_what_yaml_takes_in_silence_and_nobody_means_is_refused(tmp_path, text, words):
    with pytest.raises(ConfigError) as refused:
        load_config(write(tmp_path, text + GOOD))
    assert words in str(refused.value) and str(refused.value).startswith(str(tmp_path / "run.yaml"))


@pytest.mark.parametrize("override", ["train.steps=010", "train={steps: 1, steps: 2}", "train.seed=true"])
def test_an_override_is_read_as_strictly(tmp_path, override):
    with pytest.raises(ConfigError, match=r"train|override"):
        load_config(write(tmp_path, GOOD), [override])


def test_numbers_are_taken_as_people_write_them(tmp_path):
    """YAML 1.1 takes 1e-4, without a point, for a text."""
    config = load_config(write(tmp_path, GOOD), ["train.learning_rate=1e-4", "train.weight_decay=1", "train.seed=0x10"])
    assert (config.train.learning_rate, config.train.weight_decay, config.train.seed) == (1e-4, 1.0, 16)


def test_paths_mean_the_same_wherever_they_are_read(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    places = ["output.dir=~/out", "data.videos=clips/../videos", "pairs.folder=~/pairs", "model.lora=[~/a, b]"]
    config = load_config(write(tmp_path, GOOD), places)
    home = tmp_path / "home"
    assert (config.output.dir, config.pairs.folder) == (home / "out", home / "pairs")
    assert config.data.videos == tmp_path / "videos" and config.model.lora == (home / "a", tmp_path / "b")
    with pytest.raises(ConfigError, match=r"output.dir: .*nobody-of-that-name"):
        load_config(write(tmp_path, GOOD), ["output.dir=~nobody-of-that-name/x"])


@pytest.mark.parametrize(
    ("path", "refused"), [("~nobody-here/x", False), ("loop/x", False), ("Wan-AI/some", False), (".", True)]
)
def test_a_base_is_looked_at_where_there_is_one(tmp_path, monkeypatch, path, refused):
    """A hub's name is no folder beside the one that a command is given in."""
    export = tmp_path / "out" / "export"
    export.mkdir(parents=True)
    monkeypatch.chdir(export)
    (export / "loop").symlink_to("loop")
    text = f"output: {{dir: {tmp_path / 'out'}}}\nmodel: {{path: {path}}}"
    if refused:
        with pytest.raises(ConfigError, match=r"model\.path: \. is what this run replaces"):
            load_config(write(tmp_path, text))
    else:
        assert load_config(write(tmp_path, text)).model.path == path
