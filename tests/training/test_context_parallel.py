"""Processes that share a video's tokens: losses and gradient are those of one, and what cannot be is one line."""

from types import SimpleNamespace

import pytest
import torch
from one_step import away_from_the_start, distance
from starting import one_line

from alignkit.config import load_config, shipped_config
from alignkit.config.whole import WHOLE_SEQUENCES
from alignkit.errors import ConfigError
from alignkit.models import attention, family_module, load_model
from alignkit.planning.outline import outline
from alignkit.stores.blocks import build_together
from alignkit.stores.folders import pairs_folder
from alignkit.stores.pairs import PairStore
from alignkit.training import context, loop
from alignkit.training.context import check_lengths
from alignkit.training.distributed import Process, start_process
from alignkit.training.loop import train, train_folder
from alignkit.training.metrics import read_metrics
from alignkit.training.references.cached import cache_digest, cache_info
from alignkit.training.run import ROW, SIGNAL, Run

BOTH = "train.context_parallel=2"
LORA, FULL = "train.lora={rank: 4, alpha: 8}", "train.lora=null"
STEP = "objective={loser_safeguard: 0.5, beta: 500}", "train.micro_batch_size=1", "train.global_batch_size=2"
STEPS = {  # family, processes, settings: each value of one column with most of each other
    "wan": ("wan", 2, ["deepspeed.preset=zero3", FULL, "train.checkpointing=full"]),
    "sin-cos": ("2b", 2, ["deepspeed.preset=zero2", FULL, "train.checkpointing=selective", "train.branches=apart"]),
    "rotary": ("5b", 2, ["deepspeed.preset=zero3", LORA, "train.checkpointing=none"]),
    "two groups": ("2b", 4, ["deepspeed.preset=zero3", FULL, "train.checkpointing=selective"]),
    "two groups, not scattered": (
        "wan", 4, ["deepspeed.preset=zero2", LORA, "train.checkpointing=none", "train.branches=apart"],
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def steps(pairs_of, together_once, tmp_path_factory):
    """Folder, with a first step by each process, by the name of STEPS."""
    root, jobs = tmp_path_factory.mktemp("steps"), {2: [], 4: []}
    for name, (family, count, settings) in STEPS.items():
        home, folder = pairs_of(family)
        (root / name).mkdir()
        places = f"output.dir={root / name}", f"pairs.folder={folder / 'pairs'}"
        jobs[count].append(("first step", [*home, *places, *STEP, *settings, BOTH]))
    together_once(*jobs.items())
    return root


@pytest.mark.parametrize("name", STEPS)
def test_losses_and_gradients_are_those_of_one_process(steps, first_step, name):
    family, count, settings = STEPS[name]
    metrics, gradients = first_step(family, *STEP, *settings, change=away_from_the_start)
    assert metrics["safeguard/factor"] < 1 and metrics["rewards/margins"] != 0
    for rank in range(count):
        own, theirs = torch.load(steps / name / f"first-step-{rank}.pt")
        for key in ("loss", "error_w", "error_l", "rewards/margins", "safeguard/factor", "grad_norm"):
            assert own[key] == pytest.approx(metrics[key], rel=1e-5), key
        assert distance(theirs, gradients) <= 1e-5


RUN = (
    "train.learning_rate=1e-4", "train.micro_batch_size=1", "train.global_batch_size=2", "noise.timesteps=adaptive",
    "deepspeed.preset=zero2", "objective={beta: auto, beta_min: 5, beta_max: 50}",
)  # fmt: skip


def test_a_run_goes_on_where_it_stopped_and_is_that_of_one_process(run_with_pairs, together):
    runs = {name: run_with_pairs(name, *RUN, "train.steps=4") for name in ("one", "whole", "parts")}
    train(runs["one"][0], start_process())
    half, whole = ([*settings, BOTH] for settings in (runs["parts"][1], runs["whole"][1]))
    together((2, [("train", whole), ("train", [*half, "train.steps=2"])]), (2, [("train", half)]))
    files = {name: train_folder(config) / "metrics.jsonl" for name, (config, _) in runs.items()}
    assert files["whole"].read_bytes() == files["parts"].read_bytes()
    one, many = (read_metrics(files[name]) for name in ("one", "whole"))
    assert [row["step"] for row in many] == [1, 2, 3, 4] and many[0]["rewards/margins"] == 0.0
    for ours, theirs in zip(many, one, strict=True):
        # as of two processes and one (test_training): sums of another order, 10³ roundings deep
        assert ours["error_w"] == pytest.approx(theirs["error_w"], rel=1e3 * 2**-24)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=25 * 1e3 * 2**-24)  # β/2 is 25 at most
        assert ours["noise_level"] == pytest.approx(theirs["noise_level"], rel=1e-9)


def test_what_a_group_sees_counts_once(small_config):
    config, cpu = small_config(BOTH, "noise.timesteps=adaptive"), torch.device("cpu")
    model = SimpleNamespace(schedule=lambda steps: range(steps))
    counts = []
    for rank in range(2):
        run = SimpleNamespace(config=config, model=model, process=Process(rank, 1, rank, cpu))
        pairs = {SIGNAL: torch.tensor([0.5, 0.25]).double(), ROW: torch.tensor([1.0, 1.0]).double()}
        counts.append(Run._signals(run, [pairs])[SIGNAL].sum(1).tolist())
    assert counts == [[0.75, 2.0], [0.0, 0.0]]


def test_errors_computed_beforehand_are_those_of_the_same_processes(run_with_pairs, together):
    """Training holds the first logits to be exactly 0."""
    config, settings = run_with_pairs("run", "reference.strategy=cached", "train.steps=2", BOTH)
    together((2, [("cache-reference", settings), ("train", settings)]))
    rows = read_metrics(train_folder(config) / "metrics.jsonl")
    assert rows[0]["rewards/margins"] == 0.0 and len(rows) == 2
    process, store = start_process(), PairStore(pairs_folder(config, "train"))
    model = load_model(config.model, with_transformer=False, with_encoders=False)
    alone = config.model_copy(update={"train": config.train.model_copy(update={"context_parallel": 1})})
    infos = [cache_info(one, process, model, store) for one in (config, alone)]
    assert infos[0].made["train.context_parallel"] == 2 and cache_digest(infos[0]) != cache_digest(infos[1])


def test_those_side_by_side_make_the_same_block_and_one_of_them_writes_it(tmp_path, monkeypatch):
    from alignkit.stores import blocks

    written, made = [], []
    monkeypatch.setattr(blocks, "missing_blocks", lambda *_: [] if len(written) == 3 else [0, 1, 2])
    info = SimpleNamespace(blocks=3, rows=lambda block: range(block, block + 1), dtype="fp32")
    for rank in (3, 2, 1, 0):  # the last one waits until all is there
        looked = iter([[0, 1, 2], []])
        build_together(
            tmp_path, info, lambda rows, rank=rank: made.append((rank, rows.start)), "x", rank=rank, world_size=4,
            write=lambda _, block, *__: written.append(block), agree=lambda _, looked=looked: next(looked),
            check=lambda: None, side_by_side=2, show=False,
        )  # fmt: skip
    assert sorted(written) == [0, 1, 2]
    assert sorted(made) == [(0, 0), (0, 2), (1, 0), (1, 2), (2, 1), (2, 2), (3, 1), (3, 2)]


REFUSED = [
    (["train.context_parallel=2"], "context_parallel: 2 does not divide the 1 process"),
    (["train.context_parallel=3", "model.attention=flash_3"], "model.attention: 'flash_3' cannot share tokens"),
    (["train.context_parallel=3", "model.attention=xformers"], "model.attention: 'xformers' cannot share tokens"),
    (["deepspeed.config={sequence_parallel_size: 2}"], "sequence_parallel_size: this is train.context_parallel"),
    (["train.context_parallel=0"], "train.context_parallel: input should be greater than or equal to 1"),
]


@pytest.mark.parametrize(("settings", "line"), REFUSED)
def test_what_cannot_be_is_one_line_of_the_command(command, config_file, overrides, tmp_path, settings, line):
    result = command("train", config_file, *overrides(tmp_path / "run"), *settings)
    assert line in one_line(result)


@pytest.mark.parametrize(
    ("family", "settings", "line"),
    [
        ("wan", ["train.context_parallel=3"], "3 does not divide the 4 attention heads; what divides all of it is 2"),
        ("2b", ["train.context_parallel=4"], "4 does not divide the 2 attention heads"),
        ("wan", [BOTH, "model.attention=native_flash"], "'native_flash' cannot share tokens among processes on cpu"),
        ("wan", [BOTH, "train.lora={targets: [proj_out]}"], "'proj_out' is proj_out, which train.context_parallel"),
    ],
)
def test_what_does_not_divide_is_refused_before_weights_are_read(
    pairs_of, config_file, monkeypatch, family, settings, line
):
    process = start_process()
    for name in ("run_terms", "open_start"):
        monkeypatch.setattr(loop, name, lambda *_: pytest.fail("weights are read"))
    config = load_config(config_file, [*pairs_of(family)[0], *settings])
    monkeypatch.setattr(loop, "accumulation_steps", lambda *_: 1)  # as if there were enough processes
    with pytest.raises(ConfigError, match=line):
        train(config, process)


@pytest.mark.parametrize(
    ("name", "possible"),
    [
        ("wan2.1-1.3b", [2, 3, 4, 6, 12]),
        ("wan2.1-14b", [2, 4, 5, 8, 10]),
        ("wan2.2-a14b", [2, 4, 5, 8, 10]),
        ("cogvideox-2b", [2]),
        ("cogvideox-5b", [2]),
    ],
)
def test_the_degrees_of_the_full_models_at_480p(name, possible):
    config = load_config(shipped_config(f"{name}-localdpo.yaml"), ["data.videos=clips", "output.dir=out"])
    found = outline(config)
    data, network = config.data, found.network(1, torch.bfloat16).config
    grid = found.model.latent_grid(data.num_frames, data.height, data.width)
    fits = []
    for degree in range(2, 13):
        section = config.train.model_copy(update={"context_parallel": degree})
        try:
            check_lengths(config.model_copy(update={"train": section}), network, grid)
            fits.append(degree)
        except ConfigError as error:
            words = str(error)
    assert fits == possible
    if name == "cogvideox-2b":
        assert "does not divide the 226 tokens of a text" in words or "attention heads" in words


def test_a_family_without_a_plan_is_named(small_config, monkeypatch):
    monkeypatch.setattr(context, "family_module", lambda name: SimpleNamespace(CONTEXT_PLAN=None))
    with pytest.raises(ConfigError, match="how a network of wan is to be split is not known"):
        check_lengths(small_config(BOTH), None, ())


class Transformer(SimpleNamespace):
    def set_attention_backend(self, name):
        self.taken = name


def test_auto_passes_over_attention_that_cannot_share_tokens(monkeypatch):
    monkeypatch.setattr(attention, "try_backend", lambda *_: None)
    gpu, network = torch.device("cuda"), Transformer(config=SimpleNamespace(attention_head_dim=64))
    assert attention.set_attention(network, "auto", gpu, torch.bfloat16) == "flash_3"
    assert attention.set_attention(network, "auto", gpu, torch.bfloat16, shared="train.context_parallel") == "flash"
    assert {name for name in attention.BACKENDS if not attention.shares_tokens(name, gpu)} == set(WHOLE_SEQUENCES)


def test_a_plan_splits_text_too_where_text_meets_the_video_in_attention():
    """diffusers' own, which is taken as it is, has its text whole."""
    lengths = family_module("cogvideox").split_lengths(SimpleNamespace(patch_size=2), (13, 60, 90), 226)
    assert set(lengths.values()) == {17550, 226}
