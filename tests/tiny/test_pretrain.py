"""The training script: its config, its optimizer, its schedule, and going on after a stop."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from alignkit.errors import ConfigError
from alignkit.tiny.muon import Muon, orthogonalised
from alignkit.tiny.pretrain import load_config, main
from alignkit.tiny.stages import Ema, schedule, train_steps
from alignkit.tiny.text import ALL_ATTRIBUTES, combination, word

CONFIG = "configs/tiny-wan-pretrain.yaml"


def config_text(request) -> str:
    return (request.config.rootpath / CONFIG).read_text()


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("threads: 2", "threads: 2\ntypo: 1", "unknown key typo"),
        ("  hold: 0.4", "  hold: half", "flow.hold must be a float"),
        ("  batch: 16", "", "flow.batch is missing"),
    ],
)
def test_a_wrong_config_is_refused_by_name(request, tmp_path, capsys, old, new, named):
    text = config_text(request)
    assert old in text
    path = tmp_path / "config.yaml"
    path.write_text(text.replace(old, new))
    with pytest.raises(ConfigError, match=named):
        load_config(path)
    assert main(["--config", str(path), "--work", str(tmp_path), "--out", str(tmp_path)]) == 2
    assert named in capsys.readouterr().err


def test_orthogonalised_keeps_directions_and_evens_their_sizes():
    matrix = torch.diag(torch.tensor([4.0, 2.0, 1.0, 0.5])) @ torch.eye(4, 7)
    for given in (matrix, matrix.T):
        sizes = torch.linalg.svdvals(orthogonalised(given))
        # The quintic's fixed band: Jordan's coefficients bring every singular value to about 0.7 … 1.2.
        assert sizes.min() > 0.6 and sizes.max() < 1.3
    assert torch.allclose(orthogonalised(-matrix), -orthogonalised(matrix))


def test_the_schedule_warms_up_holds_and_falls():
    shares = [schedule(step, 1000, hold=0.5) for step in range(1000)]
    assert shares[0] == 0.01 and shares[100:501] == [1.0] * 401
    assert all(a >= b for a, b in pairwise(shares[500:]))
    assert 0.01 <= shares[-1] < 0.0101


def train_a_line(folder, steps: int, stop_after: int | None = None) -> list[float]:
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer = Muon([model.weight], [model.bias], matrix_rate=0.1, other_rate=0.1)
    ema = Ema(model, 0.9)
    losses = []
    for step in train_steps("line", folder, model, optimizer, ema, steps):
        x = torch.from_numpy(np.random.default_rng(step).normal(size=(8, 3))).float()
        loss = (model(x) - x[:, :2]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step == stop_after:
            break
    return losses + [value.sum().item() for value in ema.values.values()]


def test_a_stopped_stage_ends_as_if_it_had_not_been_stopped(tmp_path, monkeypatch):
    unbroken = train_a_line(tmp_path / "a", 12) if (tmp_path / "a").mkdir() is None else None
    monkeypatch.setattr("alignkit.tiny.stages.CHECKPOINT_SECONDS", 0.0)  # a checkpoint at every step
    (tmp_path / "b").mkdir()
    train_a_line(tmp_path / "b", 12, stop_after=7)
    resumed = train_a_line(tmp_path / "b", 12)
    assert resumed == unbroken[-len(resumed) :] and len(resumed) < len(unbroken)


def test_combinations_are_numbered_as_listed():
    assert [combination(entry) for entry in ALL_ATTRIBUTES] == list(range(192))
    longest = max(len(word(entry, wording).encode()) for entry in ALL_ATTRIBUTES for wording in range(5))
    assert longest + 1 <= 64  # the end mark fits as well
