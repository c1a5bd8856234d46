"""The manifold experiment: its surface and score, its losses against formulas, resuming, and what is checked in."""

import csv
import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from alignkit import cli
from alignkit.errors import ConfigError, DataError
from alignkit.experiments import manifold, manifold_write_up
from alignkit.experiments.manifold import arm_loss, new_network, sample, weights_file
from alignkit.experiments.manifold_plan import ARMS, Arm, Plan, height, points_of, result_file, score
from alignkit.experiments.manifold_write_up import table

WRITTEN = Path(__file__).parents[2] / "docs"
TINY = Plan(seeds=(5,), pretraining=3, fine_tuning=2, batch=16, samples=20, euler=2)
FEW = tuple(arm for arm in ARMS if arm.name in ("base", "dpo-10", "guarded"))


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(manifold, "SMOKE", TINY)
    monkeypatch.setattr(manifold, "ARMS", FEW)


def test_the_score_of_known_points():
    middle, side = 1.2 - 0.9 * math.exp(-9) + 1.2 * math.exp(-36), 1.2 * 0.85  # at (3, 0), and about at (3, 1)
    cases = {
        (3, 0, middle): (1, 1),
        (-3, 0, middle + 0.14): (1, 1),
        (3, 1, side): (1, 1),
        (3, 0, middle - 0.16): (0, 1),
        (3.99, 0, 1.2 * math.exp(-(0.99**2))): (1, 1),
        (4.01, 0, 1.2 * math.exp(-(1.01**2))): (1, 0),
        (1.99, 0, 1.2 * math.exp(-(1.01**2)) - 0.9 * math.exp(-(1.99**2))): (1, 0),
        (0, 0, -0.9): (1, 0),
        (30, 0, 5): (0, 0),
        (math.nan, 0, 0): (0, 0),
    }
    for point, (on_surface, in_range) in cases.items():
        wanted = {"strict": on_surface * in_range, "on_surface": on_surface, "in_range": in_range}
        assert score(torch.tensor([point], dtype=torch.float32)) == wanted, point
    got = score(torch.tensor(list(cases), dtype=torch.float64))
    assert got == pytest.approx({"strict": 0.4, "on_surface": 0.7, "in_range": 0.5})


def test_points_lie_on_the_surface_and_on_their_side():
    edges = torch.tensor([0.0, 0.25, 0.5, 0.75, 1 - 2**-24])  # the ends of what keyed_rand draws, and between the hills
    uniforms = torch.cat((torch.cartesian_prod(edges, edges), torch.rand(30_000, 2)))
    share_of_winners = {"winners": 1.0, "losers": 0.0, "pairs": 2 / 3}
    for side, share in share_of_winners.items():
        points = points_of(uniforms, side)
        assert points.shape == (len(uniforms), 3, 1, 1)
        x, y, z = points[..., 0, 0].unbind(1)
        assert torch.equal(z, height(x, y)) and y.abs().max() <= 1 and y.min() < -0.99 and y.max() > 0.99
        near = {"winners": (x.abs() - 3).abs() <= 1, "losers": x.abs() <= 1}
        near["pairs"] = near["winners"] | near["losers"]
        assert near[side].all()
        # four standard deviations of a share of 30 000
        assert float(near["winners"].double().mean()) == pytest.approx(share, abs=4 * 0.5 / 30_000**0.5)
        assert float((x > 0).double().mean()) == pytest.approx(0.5, abs=4 * 0.5 / 30_000**0.5)


def test_sampling_goes_from_noise_to_data():
    """Where all data are one point, the velocity is (x_t − point) / t, and Euler's steps are exact."""
    point = torch.tensor([1.0, -2.0, 0.5])

    class One(nn.Module):
        def forward(self, x):
            return (x[:, :3] - point) / x[:, 3:]

    got = sample(One(), 50, 10, seed=0)
    # ten steps that each round numbers below 8, the last one divides by t = 0.1
    assert torch.allclose(got, point.expand(50, 3), atol=100 * 8 * 2.0**-24)


@pytest.fixture
def pair():
    """fp64 networks, 8 points a side, t and noise, and the summed errors of each network on each side."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    policy, base = new_network(0).double(), new_network(1).double().requires_grad_(False)
    winners, losers = points_of(draw(8, 2), "winners"), points_of(draw(8, 2), "losers")
    t, noise = draw(8), 2 * draw(8, 3, 1, 1) - 1

    def error(network, clean):
        clean, eps = clean[..., 0, 0], noise[..., 0, 0]
        state = (1 - t[:, None]) * clean + t[:, None] * eps
        return (network(torch.cat((state, t[:, None]), 1)) - (eps - clean)).square().sum(1)

    errors = [error(network, clean) for clean in (winners, losers) for network in (policy, base)]
    return (policy, base, winners, losers, t, noise), errors


@pytest.mark.parametrize("arm", [arm for arm in ARMS if arm.trained], ids=lambda arm: arm.name)
def test_an_arms_loss_is_the_papers_formula_of_summed_errors(arm, pair):
    given, (error_w, ref_w, error_l, ref_l) = pair
    t = given[4]
    wanted = arm.sft * error_w
    if arm.beta:
        logit = -arm.beta * (1 - t) ** 2 * ((error_w - ref_w) - (error_l - ref_l))
        wanted = wanted + torch.log1p(torch.exp(-logit.abs())) + torch.relu(-logit)
    if arm.tau:
        gaps = (error_w - ref_w) - (error_l - ref_l)
        wanted = arm.tau * torch.log(1 + torch.exp(gaps / arm.tau) + torch.exp((1 - t) ** 2 * error_w / arm.tau))
    # the kernels' reference takes gaps by products and the formula by squares: roundings of errors near 10, times β
    # (logits) and a few dozen operations
    atol = 64 * 10 * max(arm.beta or 1, 1) * 2.0**-53
    assert torch.allclose(arm_loss(arm, *given), wanted, rtol=1e-13, atol=atol)


def test_a_smoke_run_resumes_and_makes_the_same_numbers_again(tiny, tmp_path, monkeypatch):
    cli.experiment("manifold", out=tmp_path, smoke=True)
    out = tmp_path / "smoke" / "manifold"
    page, file = out / "page" / "page.md", result_file(out, "guarded", 5)
    assert {"page.md", "results.csv", "samples.png"} <= {path.name for path in page.parent.iterdir()}
    before, result = page.read_text(), file.read_text()
    trained = []
    monkeypatch.setattr(manifold_write_up, "_plot", lambda *_: ["samples.png"])  # once is enough
    descend = manifold._descend
    monkeypatch.setattr(manifold, "_descend", lambda *given: (trained.append(given[-2]), descend(*given)))
    cli.experiment("manifold", out=tmp_path, smoke=True)
    assert not trained and page.read_text() == before
    file.unlink()
    cli.experiment("manifold", out=tmp_path, smoke=True)
    assert len(trained) == 1 and "winner-guarded" in trained[0]
    numbers = ("strict", "on_surface", "in_range", "error_w", "error_l")
    assert [json.loads(file.read_text())[x] for x in numbers] == [json.loads(result)[x] for x in numbers]
    weights_file(out, 5).unlink()
    cli.experiment("manifold", out=tmp_path, smoke=True)
    assert len(trained) == 2, "a base is made again, and nothing that was made from it"


def test_arms_differ_and_seeds_do(tiny, tmp_path):
    out = tmp_path / "manifold"
    manifold.run(tmp_path, smoke=True)
    with (out / "page" / "results.csv").open() as stream:
        errors = {row["arm"]: row["error_w"] for row in csv.DictReader(stream)}
    assert errors.keys() == {arm.name for arm in FEW} and len(set(errors.values())) == len(FEW)
    first, second = (list(new_network(seed).parameters()) for seed in (0, 1))
    assert all(not torch.equal(*pair) for pair in zip(first, second, strict=True))


def test_results_of_another_plan_are_refused(tiny, tmp_path, monkeypatch):
    manifold.run(tmp_path, smoke=True)
    monkeypatch.setattr(manifold, "SMOKE", Plan(seeds=(6,)))
    with pytest.raises(DataError, match="another plan"):
        manifold.run(tmp_path, smoke=True)


@pytest.mark.parametrize("family", ["wan", "cogvideox"])
def test_a_family_is_refused(tmp_path, family):
    with pytest.raises(ConfigError, match="leave --family out"):
        cli.experiment("manifold", family=family, out=tmp_path, smoke=True)
    assert not list(tmp_path.iterdir())


def test_a_row_far_from_the_published_number_says_so():
    arms = (Arm("near", "Near", 0.5), Arm("far", "Far", 0.5), Arm("own", "Own", None))
    rows = [
        {"arm": name, "strict": strict, "on_surface": 1, "in_range": 1, "error_w": 2, "error_l": 3}
        for name, values in {"near": (0.4, 0.65), "far": (0.5, 0.57), "own": (0.1, 0.1)}.items()
        for strict in values
    ]
    lines = table(arms, rows)[2:]
    assert lines[0].startswith("| Near | 0.525 ± 0.125 | 0.500 |  |")
    assert lines[1].startswith("| Far | 0.535 ± 0.035 | 0.500 | not reproduced |")
    assert lines[2].startswith("| Own | 0.100 ± 0.000 |  |  |")


def test_the_page_checked_in_follows_from_its_results():
    with (WRITTEN / "manifold" / "results.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert {(row["arm"], row["seed"]) for row in rows} == {(arm.name, str(s)) for arm in ARMS for s in Plan().seeds}
    assert "\n".join(table(ARMS, rows)) in (WRITTEN / "manifold.md").read_text()
