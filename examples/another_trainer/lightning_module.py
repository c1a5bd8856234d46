"""Diffusion-DPO on the whole latent as a Lightning module, from `pair_region_errors` and a head of `losses`.

python examples/another_trainer/lightning_module.py        (needs `pip install lightning`)
"""

import copy

import lightning
import torch
from toy import Denoiser, Pairs

from alignkit_kernels import NoiseKey, Stream, add_keyed_noise, flow_coefficients, keyed_rand, preference_loss

SEED, BETA = 0, 500.0


class Alignment(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.policy = Denoiser()
        self.reference = copy.deepcopy(self.policy).requires_grad_(False)

    def training_step(self, batch: dict, step: int) -> torch.Tensor:
        ids, clean_w, clean_l = batch["pair_id"], batch["clean_w"], batch["clean_l"]
        sigma = keyed_rand(ids.shape, NoiseKey(SEED, ids, self.current_epoch, Stream.TIMESTEP))
        rows = flow_coefficients(sigma)
        noise = NoiseKey(SEED, ids, self.current_epoch, Stream.TRAINING)
        noisy = torch.cat([add_keyed_noise(clean, rows, noise) for clean in (clean_w, clean_l)])

        pred = self.policy(noisy, sigma.repeat(2))
        with torch.no_grad():
            ref_w, ref_l = self.reference(noisy, sigma.repeat(2)).chunk(2)
        got = preference_loss(
            pred, head="dpo", reference_w=ref_w, reference_l=ref_l, clean_w=clean_w, clean_l=clean_l,
            coefficients=rows, noise_w=noise, beta=BETA,
            loser_safeguard=0.0,  # the loser pushes no further than leaves the winner's own error where it is
        )  # fmt: skip
        print(f"epoch {self.current_epoch} loss {got.loss.item():.5f} logit {got.logits_global.mean().item():+.5f}")
        return got.loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.policy.parameters(), lr=1e-3)


if __name__ == "__main__":
    torch.manual_seed(SEED)
    trainer = lightning.Trainer(
        max_epochs=2, accelerator="auto", devices=1, gradient_clip_val=1.0,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Alignment(), torch.utils.data.DataLoader(Pairs(), batch_size=4))
