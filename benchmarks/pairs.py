"""What a pair costs beside the network: `python benchmarks/pairs.py [VIDEO ...]`.

Times the mask of a pair against decoding the video that it is for, in turn in one run, and adds up what a stored pair
takes at the sizes of the full models.
"""

import argparse
import platform
import statistics
import tempfile
import time
from pathlib import Path

import torch

from alignkit.config import MaskSection
from alignkit.localdpo.masks import region_mask
from alignkit.media.videos import VideoSpec, decode_clip, write_video

SIZES = {  # model: frames, height, width, latent frames, channels, text tokens of a long caption, text width
    "Wan2.1, 81 frames of 480x832": (81, 480, 832, 21, 16, 100, 4096),
    "CogVideoX, 49 frames of 480x720": (49, 480, 720, 13, 16, 226, 4096),
}
PAIRS = 63_000  # the published data set's


def drawn_video(folder: Path, frames: int, height: int, width: int) -> Path:
    """Moving gradients with some grain, about as hard to decode as a film of that size."""
    generator = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    pictures = []
    for t in range(frames):
        picture = torch.stack([(x + 3 * t) % 256, (y + 2 * t) % 256, (x + y + t) % 256], dim=-1)
        pictures.append((picture + torch.randint(-8, 9, picture.shape, generator=generator)).clamp(0, 255))
    write_video(folder / "drawn.mp4", torch.stack(pictures).to(torch.uint8), 16)
    return folder / "drawn.mp4"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("videos", nargs="*", type=Path, help="of at least 81 frames; without any, a drawn one")
    parser.add_argument("--rounds", type=int, default=10)
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{platform.processor() or platform.machine()}, one thread, torch {torch.__version__}")
    for title, (frames, height, width, latent_frames, channels, tokens, text_width) in SIZES.items():
        with tempfile.TemporaryDirectory() as folder:
            videos = given.videos or [drawn_video(Path(folder), frames, height, width)]
            spec, grid = VideoSpec(height, width, frames), (latent_frames, height // 8, width // 8)
            masks, decodes, shares = [], [], []
            for number in range(given.rounds):
                start = time.perf_counter()
                mask = region_mask(grid, (height, width), MaskSection(), seed=0, pair_id=number)
                masks.append(time.perf_counter() - start)
                shares.append(mask.float().mean().item())
                start = time.perf_counter()
                decode_clip(videos[number % len(videos)], spec)
                decodes.append(time.perf_counter() - start)
        mask_ms, decode_ms = (1000 * statistics.median(times) for times in (masks, decodes))
        print(f"{title}: a mask {mask_ms:.1f} ms, decoding {decode_ms:.0f} ms, {decode_ms / mask_ms:.0f} times as long")
        elements = latent_frames * channels * (height // 8) * (width // 8)
        text = tokens * text_width
        for dtype, size in (("fp16", 2), ("fp32", 4)):
            stored = size * (elements * (1 + statistics.mean(shares)) + text) + elements / channels
            total = stored * PAIRS / 1e12
            print(f"  a pair in {dtype}: {stored / 1e6:.2f} MB, {PAIRS:,} pairs: {total:.2f} TB (modelled)")
        doubled = 2 * (2 * elements + 512 * text_width)
        print(f"  both videos whole and 512 text tokens, bf16: {doubled * PAIRS / 1e12:.2f} TB (modelled)")


if __name__ == "__main__":
    main()
