"""The seams: a noise source, a timestep law, a reference and a term of one's own, each a new name in one place.

What trajectory matching needs of them is tried with the smallest thing of each kind.
"""

import pytest
import torch

from alignkit.config import OBJECTIVES, NoiseSection, ObjectiveSection, ReferenceSection
from alignkit.models import family_module
from alignkit.objectives import laws, states, terms
from alignkit.objectives.laws import PathPoints
from alignkit.objectives.states.noised import Noised
from alignkit.training import references
from alignkit.training.distributed import start_process
from alignkit.training.loop import train, train_folder
from alignkit.training.metrics import read_metrics
from alignkit_kernels import NoiseKey, Stream, add_keyed_noise


def own_noise(config, law, batch, epochs):
    """Each side has the noise of a key of its own, as videos have that were sampled from different noise."""
    points = law.draw(batch.ids, epochs)
    keys = [NoiseKey(config.train.seed, 2 * batch.ids + side, epochs, Stream.ROLLOUT) for side in range(2)]
    sides = [
        add_keyed_noise(x, points.coefficients, key) for x, key in zip((batch.winner, batch.loser), keys, strict=True)
    ]
    return Noised(*sides, points.coefficients, points.timesteps, *keys, weight=points.weight)


class Adaptive:
    """Remembers how often it was told of a step, and moves its rows and weights by that."""

    def __init__(self, config, model):
        self.schedule = model.schedule(config.sample.num_inference_steps)
        self.seen = torch.zeros(len(self.schedule), dtype=torch.float64)

    def draw(self, ids, epochs):
        rows = (ids + int(self.seen.sum())) % len(self.schedule)
        weight = 1 + 0.1 * self.seen[rows]
        return PathPoints(self.schedule.coefficients[rows], self.schedule.timesteps[rows], rows, weight)

    def observe(self, metrics):
        self.seen[int(1000 * metrics["error_w"]) % len(self.seen)] += 1

    def state(self):
        return {"seen": self.seen}

    def load_state(self, state):
        self.seen = state["seen"]


class Following:
    """The policy's own predictions of the step before last, scaled: a reference that moves and has a state."""

    def __init__(self, config, process, policy, model, start):
        self.predict, self.policy, self.scale = family_module(model.family).predict, policy, 1.0

    @torch.no_grad()
    def answer(self, batch, shown):
        answer = self.predict(self.policy, shown.inputs, shown.timesteps, shown.text)
        return (self.scale * answer).chunk(2)

    def after_step(self, policy):
        assert policy is self.policy
        self.scale *= 0.999

    def state(self):
        return {"scale": self.scale}

    def load_state(self, state):
        self.scale = state["scale"]


def loser_kept_near(pairs):
    return pairs.means.error_l


@pytest.fixture
def extended(monkeypatch):
    monkeypatch.setitem(states.SOURCES, "own", own_noise)
    monkeypatch.setitem(laws.LAWS, "adaptive", Adaptive)
    monkeypatch.setitem(references.STRATEGIES, "following", Following)
    monkeypatch.setitem(terms.TERMS, "weight_sft", loser_kept_near)

    def extend(config):
        noise = config.noise.model_copy(update={"source": "own", "timesteps": "adaptive"})
        reference = config.reference.model_copy(update={"strategy": "following"})
        return config.model_copy(update={"noise": noise, "reference": reference})

    return extend


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
def test_new_kinds_train_and_resume_as_one(run_with_pairs, extended):
    process = start_process()
    files = {}
    for name, stops in (("whole", (6,)), ("parts", (2, 4, 6))):
        config, _ = run_with_pairs(name, "train.learning_rate=1e-4", "objective.weight_sft=3.0")
        for steps in stops:
            section = config.train.model_copy(update={"steps": steps})
            assert train(extended(config.model_copy(update={"train": section})), process)
        files[name] = (train_folder(config) / "metrics.jsonl").read_bytes()
    assert files["parts"] == files["whole"]
    rows = read_metrics(train_folder(config) / "metrics.jsonl")
    assert rows[0]["rewards/margins"] == 0.0, "policy and reference agree before the first step"
    # both sides' noise, the law's rows and the term are in the numbers: a pair's error is taken at its own noise
    assert all(0 < row["error_w"] < 3 and 0 < row["error_l"] < 3 for row in rows)
    assert rows[0]["loss"] == pytest.approx(2 * 0.6931471805599453 + 3 * rows[0]["error_l"], rel=1e-12)
    assert len({row["noise_level"] for row in rows}) > 2


@pytest.mark.parametrize(
    ("section", "key", "known"),
    [
        (NoiseSection, "source", states.SOURCES),
        (NoiseSection, "timesteps", laws.LAWS),
        (ReferenceSection, "strategy", {**references.STRATEGIES, "auto": None}),
    ],
)
def test_the_names_of_the_configuration_are_those_that_exist(section, key, known):
    assert set(section.model_fields[key].annotation.__args__) == set(known)


def test_every_term_has_a_key_that_weighs_it():
    assert all(key in OBJECTIVES["local_dpo"] and key in ObjectiveSection.model_fields for key in terms.TERMS)
