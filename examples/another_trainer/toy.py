"""A toy denoiser and toy pairs, so that the recipes run anywhere in seconds.

A pair is two latents [C, F, H, W] that differ inside a mask: `clean_w` is the better one. `pair_id` is the row
number in the store, and what the noise of both sides is keyed by.
"""

import torch
from torch import Tensor, nn

CHANNELS, FRAMES, SIZE = 4, 3, 8


class Denoiser(nn.Module):
    def __init__(self, width: int = 16):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv3d(CHANNELS + 1, width, 3, padding=1), nn.SiLU(), nn.Conv3d(width, CHANNELS, 3, padding=1)
        )

    def forward(self, noisy: Tensor, sigma: Tensor) -> Tensor:
        level = sigma.view(-1, 1, 1, 1, 1).expand(-1, 1, *noisy.shape[2:])
        return self.body(torch.cat((noisy, level.to(noisy.dtype)), dim=1))


class Pairs(torch.utils.data.Dataset):
    def __init__(self, size: int = 16):
        generator = torch.Generator().manual_seed(0)
        shape = (size, CHANNELS, FRAMES, SIZE, SIZE)
        self.clean_w = torch.randn(shape, generator=generator)
        self.mask = torch.zeros(size, 1, FRAMES, SIZE, SIZE, dtype=torch.uint8)
        self.mask[..., 2:6, 1:5] = 1
        self.clean_l = torch.where(self.mask.bool(), torch.randn(shape, generator=generator), self.clean_w)

    def __len__(self) -> int:
        return len(self.clean_w)

    def __getitem__(self, i: int) -> dict:
        return {
            "pair_id": i, "clean_w": self.clean_w[i], "clean_l": self.clean_l[i],
            "mask": self.mask[i], "strength": torch.tensor((0.76, 0.84, 0.9)[i % 3]),
        }  # fmt: skip
