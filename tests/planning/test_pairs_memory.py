"""What a GPU that builds pairs holds by the plan: weights, and the larger of a forward and a video in the VAE."""

import re
from copy import deepcopy

import pytest
import torch

from alignkit.config import load_config, shipped_config
from alignkit.planning.constants import GPUS
from alignkit.planning.counting import Live, forward_bytes, fused_attention, video_bytes
from alignkit.planning.outline import outline
from alignkit.planning.plan import plan
from alignkit.planning.report import report

TILES = {"wan2.1-14b": (256, 256, 192, 192), "cogvideox-2b": (256, 256, 0.25, 0.25)}


def config(name, *settings):
    return load_config(shipped_config(f"{name}-localdpo.yaml"), ["data.videos=clips", "output.dir=out", *settings])


def size(frames, height, width):
    return f"data.num_frames={frames}", f"data.height={height}", f"data.width={width}"


@pytest.mark.parametrize(("name", "frames"), [("wan2.1-14b", 5), ("cogvideox-2b", 9)])
@pytest.mark.parametrize(("height", "width"), [(288, 288), (192, 464)])
def test_a_video_in_tiles_holds_what_diffusers_tiles_do(name, frames, height, width):
    """All tiles run, at sizes where there are few."""
    own = config(name, *size(frames, height, width), "model.vae_tiling=true")
    counted, vae = video_bytes(found := outline(own), own), deepcopy(found.autoencoder)
    vae.enable_tiling(*TILES[name])
    with torch.device("meta"):
        video = torch.empty(1, 3, frames, height, width)
    with torch.no_grad(), fused_attention():
        with Live([*vae.parameters(), video]) as encoding:
            latents = vae.encode(video).latent_dist.mode()
        with Live([*vae.parameters(), latents]) as decoding:
            vae.decode(latents)
    # of the last tile and the others' pixels: not all of those are there when it holds most
    assert counted == pytest.approx(max(encoding.peak, decoding.peak), rel=0.03)


def test_tiles_are_for_videos_of_more_than_one():
    whole, tiled = (config("wan2.1-1.3b", *size(5, 256, 256), f"model.vae_tiling={on}") for on in ("false", "true"))
    assert video_bytes(outline(whole), whole) == video_bytes(outline(tiled), tiled)
    whole, tiled = (config("wan2.1-1.3b", *size(5, 480, 832), f"model.vae_tiling={on}") for on in ("false", "true"))
    assert video_bytes(outline(tiled), tiled) < 0.3 * video_bytes(outline(whole), whole)


def test_a_forward_of_two_videos_holds_twice_as_much():
    own = config("wan2.1-1.3b", *size(5, 256, 256))
    found = outline(own)
    one, two = (forward_bytes(found, own, torch.bfloat16, videos) for videos in (1, 2))
    assert two == pytest.approx(2 * one, rel=0.01)


def lines(*settings, name="wan2.1-14b"):
    text = report(plan(config(name, *settings), GPUS["H100"], 32))
    return text[text.index("building pairs") :].splitlines()


def test_what_does_not_fit_is_said_to_fit_in_tiles():
    large = size(5, 1440, 2560)
    said = lines(*large)
    assert "DOES NOT FIT" in said[2] and "a video in the VAE" in said[2] and "model.vae_tiling=true: " in said[3]
    fits = lines(*large, "model.vae_tiling=true")
    assert fits[2].split(":")[1] == " fits" and said[3].split(": ")[1] in fits[2]


def test_processes_that_share_tokens_share_a_forward():
    keys = *size(5, 480, 832), "pairs.batch_size=32", "model.vae_tiling=true"
    one, two = (lines(*keys, f"pairs.context_parallel={n}")[2] for n in (1, 2))
    one, two = (float(re.search(r"a forward ([\d.]+) GB", line)[1]) for line in (one, two))
    assert one / 2 < two < 0.6 * one  # each has what goes into the first block whole


def test_cogvideox_guides_in_one_forward():
    keys = *size(9, 480, 720), "pairs.batch_size=32", "model.vae_tiling=true"
    once, twice = (lines(*keys, f"pairs.guidance_scale={scale}", name="cogvideox-2b")[2] for scale in (1.0, 6.0))
    once, twice = (float(re.search(r"a forward ([\d.]+) GB", line)[1]) for line in (once, twice))
    assert twice == pytest.approx(2 * once, rel=0.01)
