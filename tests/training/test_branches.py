"""Winners and losers one after the other: the gradient of both together, with half the activations."""

import weakref

import pytest
import torch
from one_step import away_from_the_start, distance

from alignkit.objectives import terms
from alignkit.training.distributed import start_process
from alignkit.training.loop import train, train_folder
from alignkit.training.metrics import read_metrics

LORA, FULL = "train.lora={rank: 4, alpha: 8}", "train.lora=null"
SAFE = "objective={loser_safeguard: 0.5, beta: 500}"


class OwnTeacher:
    weight, network = 100.0, None

    def distance(self, prediction, states, negative):
        return prediction.double().square().flatten(1).mean(dim=1)


def taught(run):
    away_from_the_start(run)
    run.teacher = OwnTeacher()


@pytest.fixture
def compared(first_step):
    """`compared("wan", ...)`: (metrics, gradients) of a step of two micro-batches, together and apart."""

    def both(family, *settings, change=away_from_the_start):
        settings = "train.micro_batch_size=1", "train.global_batch_size=2", *settings
        return [first_step(family, *settings, f"train.branches={how}", change=change) for how in ("together", "apart")]

    return both


@pytest.mark.parametrize(  # each value of one column with each of the others
    ("family", "preset", "weights"),
    [("wan", "zero2", LORA), ("wan", "zero3", FULL), ("2b", "zero2", FULL), ("2b", "zero3", LORA)],
)
def test_the_gradient_is_that_of_both_together(compared, family, preset, weights):
    together, apart = compared(family, f"deepspeed.preset={preset}", weights, SAFE)
    assert apart[0]["safeguard/factor"] == pytest.approx(together[0]["safeguard/factor"], rel=1e-5)
    assert apart[0]["safeguard/factor"] < 1 and apart[0]["rewards/margins"] != 0
    assert distance(apart[1], together[1]) <= 1e-5


def test_terms_of_ones_own_and_a_teacher_reach_both_sides(compared, monkeypatch):
    """The loss is then made step by step."""
    monkeypatch.setitem(terms.TERMS, "weight_sft", lambda pairs: pairs.means.error_w * pairs.means.error_l)
    settings = "deepspeed.preset=zero2", "objective={loser_safeguard: 0.5, beta: 500, weight_sft: 0.3}"
    together, apart = compared("2b", *settings, change=taught)
    assert apart[0]["teacher/distance"] > 0
    assert distance(apart[1], together[1]) <= 1e-5
    _, without = compared("2b", *settings)
    assert distance(without[1], together[1]) > 1e-2, "the teacher is in the gradient"


class Kept(torch.autograd.graph.saved_tensors_hooks):
    """Bytes that the backward pass has waiting for it at once, at most; each storage once, weights apart."""

    def __init__(self):
        self.live, self.peak, self.weights = {}, 0, set()
        super().__init__(self._pack, lambda held: held[0])

    def _pack(self, tensor):
        storage = tensor.untyped_storage()
        if (key := storage.data_ptr()) not in self.weights:
            count, size = self.live.get(key, (0, storage.nbytes()))
            self.live[key] = count + 1, size
            self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        held = Held([tensor])
        weakref.finalize(held, self._free, key)
        return held

    def _free(self, key):
        count, size = self.live.pop(key, (1, 0))
        if count > 1:
            self.live[key] = count - 1, size


class Held(list):
    """A list that can be watched."""


@pytest.mark.parametrize("family", ["wan", "2b"])
def test_one_side_has_half_the_activations(first_step, family):
    peaks = {}
    for branches in ("together", "apart"):
        kept = Kept()

        def note_weights(run, kept=kept):
            kept.weights |= {p.untyped_storage().data_ptr() for p in run.policy.module.parameters()}

        settings = "deepspeed.preset=zero2", "train.checkpointing=none", f"train.branches={branches}"
        first_step(family, *settings, "train.global_batch_size=2", watch=kept, change=note_weights)
        assert not kept.live, "all of it is given back"
        peaks[branches] = kept.peak
    assert 0 < peaks["apart"] <= 0.55 * peaks["together"]


def test_a_run_goes_on_as_it_would_have_together_and_where_it_stopped(run_with_pairs):
    """Its steps and its micro-batches are counted as they are together."""
    files, process = {}, start_process()
    for name, branches, stops in (("together", "together", (3,)), ("whole", "apart", (3,)), ("parts", "apart", (2, 3))):
        config, _ = run_with_pairs(name, f"train.branches={branches}")
        for steps in stops:
            section = config.train.model_copy(update={"steps": steps})
            assert train(config.model_copy(update={"train": section}), process)
        files[name] = train_folder(config) / "metrics.jsonl"
    assert files["whole"].read_bytes() == files["parts"].read_bytes()
    together, apart = (read_metrics(files[name]) for name in ("together", "whole"))
    assert [row["step"] for row in apart] == [1, 2, 3] and apart[0]["rewards/margins"] == 0.0
    for one, other in zip(together, apart, strict=True):
        # as of two processes and one (test_training): sums of another order, 10³ roundings deep
        assert one["error_w"] == pytest.approx(other["error_w"], rel=1e3 * 2**-24)
        assert one["rewards/margins"] == pytest.approx(other["rewards/margins"], abs=2500 * 1e3 * 2**-24)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=2500 * 1e3 * 2**-24)
    assert apart[2]["rewards/margins"] != 0.0


def test_winners_alone_have_nothing_to_be_apart_from(first_step):
    steps = [first_step("2b", "objective={name: sft}", f"train.branches={how}") for how in ("together", "apart")]
    assert steps[0][0] == steps[1][0] and distance(steps[1][1], steps[0][1]) == 0
