"""A CONFIG is a file, the folder of a run, or a name that comes with alignkit; errors name what it turned out to be."""

import pytest

from alignkit.config import dump_config, load_config, shipped_config, shipped_configs
from alignkit.errors import ConfigError


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Names must not be found because of where the tests run."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def run(tmp_path):
    """`run("train.steps=3")`: a folder in which a run was begun."""

    def begin(*overrides, folder="mine"):
        config = load_config("wan-tiny-localdpo", [f"output.dir={tmp_path / folder}", *overrides])
        config.output.dir.mkdir()
        (config.output.dir / "config.yaml").write_text(dump_config(config))
        return config

    return begin


def test_the_list_has_every_configuration_of_a_run_with_a_line_that_says_what_it_is(command):
    lines = command("configs").stdout.splitlines()
    assert [line.split()[0] for line in lines] == list(shipped_configs())
    assert len(lines) == 2 * 6 + 1, "of each method: two small models, four full ones; one of a model with two experts"
    for line in lines:
        assert line.endswith(".") and 40 < len(line) < 150, "the first line of a file is a sentence of its own"


@pytest.mark.parametrize(
    ("name", "file"), [("wan2.1-14b", "wan2.1-14b-localdpo"), ("wan2.1-14b-apo", "wan2.1-14b-apo")]
)
def test_what_init_prints_is_the_shipped_file(command, tmp_path, name, file):
    result = command("init", name)
    (tmp_path / "run.yaml").write_text(result.stdout)
    assert load_config("run.yaml") == load_config(name) == load_config(shipped_config(f"{file}.yaml"))
    assert (file in result.stderr) == (name != file), "said where the name was not the whole one"


def test_an_unknown_name_is_one_line_with_the_nearest(command):
    for words in (("init", "wan2.1-14"), ("train", "Wan2.1-14B-apo"), ("experiment", "localdpo", "--config", "wan14b")):
        result = command(*words)
        assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr
        assert f"alignkit: {words[-1]}: no" in result.stderr and "did you mean wan2.1-14b" in result.stderr


def test_a_file_of_a_shipped_name_wins_and_so_does_a_run(tmp_path, run):
    run("train.steps=7", folder="wan-tiny-localdpo")
    assert load_config("wan-tiny-localdpo").train.steps == 7
    (tmp_path / "wan-tiny-apo").write_text("output: {dir: out}\ntrain: {steps: 5}")
    assert load_config("wan-tiny-apo").train.steps == 5
    (tmp_path / "wan2.1-14b").mkdir()
    assert load_config("wan2.1-14b").model.path.startswith("Wan-AI"), "a folder that is no run's is no configuration"


def test_a_run_goes_on_with_its_own_settings_and_overrides_beside_them(run):
    config = run("train.steps=7", "objective={name: dpo, beta: 9}", "data.videos=clips")
    assert load_config("mine") == config
    assert load_config("mine", ["sample.count=3"]).sample.count == 3
    assert (
        load_config("mine", ["objective.name=sft"]).objective.beta
        == load_config("wan-tiny", ["objective={}"]).objective.beta
    )


def test_a_run_that_was_moved_goes_on_where_it_is(run, tmp_path):
    run()
    (tmp_path / "mine").rename(tmp_path / "moved")
    assert load_config("moved").output.dir == tmp_path / "moved"
    assert load_config("moved", ["output.dir=other"]).output.dir == tmp_path / "other"


def test_what_was_said_for_one_start_is_not_said_again(run):
    run("train={steps: 7, restart: true, reshape: true, accept: [train.learning_rate]}")
    train = load_config("mine").train
    assert (train.steps, train.restart, train.reshape, train.accept) == (7, False, False, ())


def test_errors_name_the_file_that_was_found(run, tmp_path):
    run()
    for given, file in (("mine", "mine/config.yaml"), ("wan-tiny", str(shipped_config("wan-tiny-localdpo.yaml")))):
        with pytest.raises(ConfigError) as refused:
            load_config(given, ["train.stepz=1"])
        assert str(refused.value).startswith(f"{file}: train.stepz: unknown key")


def test_a_folder_in_which_no_run_began_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"^empty: a folder without config\.yaml"):
        load_config("empty")
