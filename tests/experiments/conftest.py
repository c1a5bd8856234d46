"""What the tests of both experiments with small models share."""

import pytest

from alignkit.experiments.plan import run_config


@pytest.fixture
def cheaply(monkeypatch):
    """`cheaply(module, plan)`: the module's experiment follows `plan`, with steps as few as a strength allows."""
    cheap = ("pairs.num_inference_steps=4", "pairs.strengths=[3]", "sample.num_inference_steps=4")
    cheap += ("train.global_batch_size=4", "train.micro_batch_size=4", "evaluation.positions=[0.5]")

    def cheaper(plan, out, folder, *settings):
        return run_config(plan, out, folder, *cheap, *settings)

    def make(module, plan):
        monkeypatch.setattr(module, "make_plan", lambda family, smoke: plan)
        for name in (module.__name__.rsplit(".", 1)[1], "driver", "stores"):
            monkeypatch.setattr(f"alignkit.experiments.{name}.run_config", cheaper)

    return make
