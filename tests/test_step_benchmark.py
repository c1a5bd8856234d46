"""The step benchmark compares two ways to do the same work."""

import csv
from pathlib import Path

import pytest
import torch

from alignkit.config import load_config
from alignkit.stores.pairs import PairBatch
from alignkit_kernels import local_dpo_loss

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def step(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import step

    return step


def test_the_plain_loss_is_the_fused_one(step, config_file, tmp_path):
    config = load_config(config_file, [f"output.dir={tmp_path}", "objective={}"])  # the kernel's own defaults
    generator = torch.Generator().manual_seed(0)
    winner, loser, noise, *moves = torch.randn(7, 3, 4, 2, 6, 6, generator=generator).unbind()
    mask = (torch.rand(3, 1, 2, 6, 6, generator=generator) < 0.3).to(torch.uint8)
    batch = PairBatch(torch.arange(3), winner, loser, mask, [], torch.tensor([0.75, 0.8, 0.9], dtype=torch.float64))
    targets = noise - winner, noise - loser
    reference = torch.cat([target + 0.3 * move for target, move in zip(targets, moves[:2], strict=True)])
    pred = reference + 0.01 * torch.cat(moves[2:])
    coefficients = torch.tensor([[0.5, 0.5, 1.0, -1.0]]).expand(3, 4)
    fused = local_dpo_loss(
        *pred.chunk(2), reference_w=reference[:3], reference_l=reference[3:], clean_w=winner, clean_l=loser,
        coefficients=coefficients, noise_w=noise, regions=mask, strength=batch.strength,
    )  # fmt: skip
    plain = step.Plain.loss(type("Settings", (), {"config": config}), pred, reference, targets, batch)
    # errors near 0.1 rounded to fp32, halved and times β = 5000
    assert plain.item() == pytest.approx(fused.loss.item(), abs=2500 * 1.9 * 2 * 2**-24)


def test_each_rung_takes_its_step_and_is_measured_beside_the_others(command, tmp_path):
    """Under ZeRO-3. What torch compiles is left out: the compiler alone would take longer than all of this."""
    rungs = ("plain", "alignkit", "+ cached", "+ selective", "+ apart")
    options = ("--models", "tiny-wan", "--preset", "zero3", "--rounds", "1", "--csv", tmp_path / "rows.csv")
    code = "import runpy, sys; sys.path.insert(0, sys.argv[1]); del sys.argv[1]\n"
    code += "runpy.run_path(sys.path[0] + '/step.py', run_name='__main__')"
    answer = command(BENCHMARKS, *options, "--rungs", *rungs, python=("-c", code))
    assert answer.returncode == 0, answer.stderr
    rows = {row["rung"]: row for row in csv.DictReader((tmp_path / "rows.csv").open())}
    assert list(rows) == list(rungs)
    assert all(float(row[f"{part}_s"]) > 0 for row in rows.values() for part in ("data", "policy", "optimizer"))
    assert all(row["device"] and row["torch"] == torch.__version__ and row["attention"] == "native"
               for row in rows.values())  # fmt: skip
    copied, cached = rows["alignkit"], rows["+ cached"]
    assert float(cached["reference_s"]) < 0.1 * float(copied["reference_s"])
    assert float(cached["to_alignkit"]) == pytest.approx(float(copied["step_s"]) / float(cached["step_s"]), rel=0.01)
    # fp32 weights, masters, gradients and both moments without a second model's weights: 5 of 6 parts, and a buffer
    assert float(cached["held_gb"]) / float(copied["held_gb"]) == pytest.approx(5 / 6, abs=0.02)
    assert 0 < float(cached["cache_s_per_pair"]) < float(cached["cache_s"])
    assert not copied["cache_s"] and not copied["to_alignkit"] and not rows["plain"]["to_plain"]
    assert (tmp_path / "rows.png").stat().st_size > 0
