"""The training script: its config, its optimizer, its schedule, and going on after a stop."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from alignkit.errors import ConfigError
from alignkit.tiny.muon import Muon, orthogonalised
from alignkit.tiny.pretrain import load_config, main
from alignkit.tiny.recipes import FAMILIES, recipe_of
from alignkit.tiny.recipes.cogvideox import mix_channels
from alignkit.tiny.stages import Ema, schedule, train_steps
from alignkit.tiny.text import ALL_ATTRIBUTES, combination, word
from alignkit.tiny.transformer import contrasted, prediction_error


def config_text(request, family: str) -> str:
    return (request.config.rootpath / f"configs/tiny-{family}-pretrain.yaml").read_text()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("seed: 0", "seed: 0\ntypo: 1", "unknown key typo"),
        ("  hold: 0.4", "  hold: half", "transformer.hold must be a float"),
        ("  autocast: ", "  autocast: 1 # ", "vae.autocast must be true or false"),
        ("  batch: 16", "", "transformer.batch is missing"),
        ("family: ", "family: no-", "family must be one of wan, cogvideox"),
    ],
)
def test_a_wrong_config_is_refused_by_name(request, tmp_path, capsys, family, old, new, named):
    text = config_text(request, family)
    assert old in text
    path = tmp_path / "config.yaml"
    path.write_text(text.replace(old, new, 1))
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


@pytest.mark.parametrize("family", FAMILIES)
def test_the_vae_takes_the_batches_it_trains_on(family):
    """Every shape comes back as long and as large as it went in, also without the final clamp."""
    recipe = recipe_of(family)
    vae = recipe.new_vae().eval()
    for _, frames, size in recipe.VAE_BATCHES:
        video = torch.zeros(1, 3, frames, size, size)
        with torch.no_grad():
            latents = vae.encode(video).latent_dist.mean
            assert recipe.decode_unclamped(vae, latents).shape == video.shape
            whole = vae.decode(latents).sample
            assert torch.equal(whole, recipe.decode_unclamped(vae, latents).clamp(whole.min(), whole.max()))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_transformers_target_is_the_familys_own(family):
    """A network that returns nothing has the mean square of c·ε + d·x0 as its error; the state is a·seen + s·ε."""
    recipe = recipe_of(family)
    clean, noise, seen = torch.randn(3, 3, 5, 8, 12, 12, generator=torch.Generator().manual_seed(0))
    states = []

    class Nothing(torch.nn.Module):
        config = recipe.new_transformer().config

        def forward(self, hidden_states, **given):
            states.append((hidden_states, given["timestep"]))
            return (torch.zeros_like(hidden_states),)

    u, text = torch.tensor([0.0, 0.5, 1.0]), torch.zeros(3, 4, 64)
    error = prediction_error(recipe, Nothing(), u, clean, noise, text, seen).square().mean()
    rows, timesteps = recipe.ADAPTER("", 4, recipe.new_scheduler()).training_path(u.double())
    a, s, c, d = rows.float().T.reshape(4, 3, 1, 1, 1, 1)
    assert error.item() == pytest.approx((c * noise + d * clean).square().mean().item(), rel=1e-5)
    assert torch.equal(states[0][0], a * seen + s * noise) and torch.equal(states[0][1], timesteps.float())
    assert torch.equal(states[0][0][2], noise[2])  # u = 1 is pure noise in both families


def test_the_contrast_weighs_only_what_versions_of_a_clip_do_not_share():
    error = torch.randn(4, 3, 2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(contrasted(error, 1.0), error.square().mean())
    shared = error[:, :1].expand_as(error)
    torch.testing.assert_close(contrasted(shared, 20.0), shared.square().mean())
    opposite = torch.cat([error, -error], dim=1)
    torch.testing.assert_close(contrasted(opposite, 20.0), 20 * error.square().mean())


@pytest.mark.parametrize("centred", [False, True])
def test_mixing_channels_inside_the_vae_changes_no_rebuilt_video(centred):
    torch.manual_seed(0)
    vae = recipe_of("cogvideox").new_vae().double().eval()
    video = torch.rand(1, 3, 9, 24, 24, dtype=torch.float64) * 2 - 1
    mix = torch.randn(8, 8, dtype=torch.float64) + 3 * torch.eye(8, dtype=torch.float64)
    centre = torch.randn(8, dtype=torch.float64) * centred
    # A layer sums at most 40 channels x 27 = 1080 products, each rounded by 2**-53 of values near 10 at most; undoing
    # the mix multiplies that by its condition, and of the decoder's layers, some thirty, each adds as much again.
    layer = 1080 * 2**-53 * 10 * torch.linalg.cond(mix).item()
    first, norm = vae.decoder.conv_in, vae.decoder.norm_out
    with torch.no_grad():
        before = vae.encode(video).latent_dist
        variance = before.var.mean(dim=(0, 2, 3, 4))
        read = [first(before.mean)[0], norm.conv_y(before.mean)[0], norm.conv_b(before.mean)[0]]
        rebuilt = vae.decode(before.mean).sample
        mix_channels(vae, mix, centre, variance)
        after = vae.encode(video).latent_dist
        mixed = torch.einsum("dc,bcfhw->bdfhw", mix, before.mean - centre.view(-1, 1, 1, 1))
        torch.testing.assert_close(after.mean, mixed, rtol=0, atol=layer)
        torch.testing.assert_close(after.var.mean(dim=(0, 2, 3, 4)), mix.square() @ variance, rtol=layer, atol=0)
        again = [first(after.mean)[0], norm.conv_y(after.mean)[0], norm.conv_b(after.mean)[0]]
        for one, other in zip(read, again, strict=True):
            inside = (..., slice(1, -1), slice(1, -1))  # the first layer pads with zeros
            torch.testing.assert_close(other[inside], one[inside], rtol=0, atol=layer)
        if not centred:
            torch.testing.assert_close(vae.decode(after.mean).sample, rebuilt, rtol=0, atol=30 * layer)
