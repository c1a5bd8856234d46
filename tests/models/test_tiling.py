"""`model.vae_tiling`: videos in tiles, of the same sizes and nearly the same latents, and what is told of it."""

import pytest
import torch

from alignkit.config import ModelSection
from alignkit.evaluation.shared import model_terms
from alignkit.models import load_model
from alignkit.stores.folders import encoding_terms

SHARED = 64  # pixels in which neighbouring tiles overlap


@pytest.fixture(scope="module", params=["wan", "cogvideox"])
def models(request):
    """The same model twice: as ever, and with tiles."""
    section = ModelSection(family=request.param, max_sequence_length=24)
    sections = section, section.model_copy(update={"vae_tiling": True})
    return [load_model(one, with_transformer=False) for one in sections]


def video(height, width):
    """Smooth and faint, so that no decoded tile leaves the range and is cut; uint8 [1, 9, H, W, 3]."""
    y, x = torch.meshgrid(torch.linspace(0, 6, height), torch.linspace(0, 4, width), indexing="ij")
    frames = [torch.stack([y + x + shift, y - shift, x + shift], -1) for shift in torch.linspace(0, 1, 9)]
    return (torch.stack(frames)[None].sin() * 40 + 128).to(torch.uint8)


def blended(first, second, dim, shared):
    """Two tiles as one: the second takes over evenly in the `shared` places along `dim` that both have."""
    weights = (torch.arange(shared) / shared).view(-1, *[1] * (first.ndim - 1 - dim))
    before, left = first.split([first.shape[dim] - shared, shared], dim)
    right, after = second.split([shared, second.shape[dim] - shared], dim)
    return torch.cat([before, left * (1 - weights) + right * weights, after], dim)


@pytest.mark.parametrize(("height", "width"), [(288, 32), (32, 320)])
def test_a_video_of_several_tiles_is_those_tiles_blended(models, height, width):
    whole, tiled = models
    pixels, side = video(height, width), 2 if height > width else 3
    tiles = (0, 256), (192, pixels.shape[side] - 192)
    latents, along = tiled.encode_video(pixels), side + 1
    factor = pixels.shape[side] // latents.shape[along]
    pieces = [whole.encode_video(pixels.narrow(side, start, size)) for start, size in tiles]
    torch.testing.assert_close(latents, blended(*pieces, along, SHARED // factor))
    shown = tiled.decode_video(latents)
    pieces = [whole.decode_video(latents.narrow(along, start // factor, size // factor)) for start, size in tiles]
    expected = blended(*(piece.float() for piece in pieces), side, SHARED)
    assert shown.shape == pixels.shape
    assert (shown.float() - expected).abs().max() <= 1.01  # each tile was rounded by itself
    assert not torch.equal(latents, whole.encode_video(pixels))


def test_a_small_video_is_one_tile(models):
    whole, tiled = models
    frames = video(64, 256)
    assert torch.equal(whole.encode_video(frames), tiled.encode_video(frames))


def test_what_holds_latents_or_videos_tells_of_tiles_and_older_terms_stay():
    plain, tiled = ModelSection(), ModelSection(vae_tiling=True)
    assert encoding_terms(plain) == {} and encoding_terms(tiled) == {"vae_tiling": True}
    assert "vae_tiling" not in model_terms(plain, 4) and model_terms(tiled, 4)["vae_tiling"] is True
