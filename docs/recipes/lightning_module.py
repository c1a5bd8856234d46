"""Diffusion-DPO on the whole latent as a Lightning module, from `pair_region_errors` and a head of `losses`.

python docs/recipes/lightning_module.py        (needs `pip install lightning`)
"""

import copy

import lightning
import torch
from toy import Denoiser, Pairs

from alignkit_kernels import NoiseKey, Stream, add_keyed_noise, keyed_rand, losses, pair_region_errors

SEED, BETA = 0, 500.0


class Alignment(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.policy = Denoiser()
        self.reference = copy.deepcopy(self.policy).requires_grad_(False)

    def training_step(self, batch: dict, step: int) -> torch.Tensor:
        ids, clean_w, clean_l = batch["pair_id"], batch["clean_w"], batch["clean_l"]
        sigma = keyed_rand(ids.shape, NoiseKey(SEED, ids, self.current_epoch, Stream.TIMESTEP))
        rows = torch.stack((1 - sigma, sigma, torch.ones_like(sigma), -torch.ones_like(sigma)), dim=1)
        noise = NoiseKey(SEED, ids, self.current_epoch, Stream.TRAINING)
        noisy = torch.cat([add_keyed_noise(clean, rows, noise) for clean in (clean_w, clean_l)])

        pred_w, pred_l = self.policy(noisy, sigma.repeat(2)).chunk(2)
        with torch.no_grad():
            ref_w, ref_l = self.reference(noisy, sigma.repeat(2)).chunk(2)
        errors = pair_region_errors(pred_w, pred_l, clean_w, clean_l, rows, noise, reference_w=ref_w, reference_l=ref_l)
        elements = errors.count.sum(1)
        # keep the winner's own error from rising: the loser pushes no further than the winner allows
        keep = losses.loser_safeguard(errors.error_w, errors.cross)
        gap_l = losses.scale_gradient(errors.gap_l.sum(1), keep)
        logits = losses.logits_of(errors.gap_w.sum(1) / elements, gap_l / elements, BETA)
        loss = losses.dpo(logits).mean()
        print(f"epoch {self.current_epoch} loss {loss.item():.5f} logit {logits.mean().item():+.5f}")
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.policy.parameters(), lr=1e-3)


if __name__ == "__main__":
    torch.manual_seed(SEED)
    trainer = lightning.Trainer(
        max_epochs=2, accelerator="auto", devices=1, gradient_clip_val=1.0,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Alignment(), torch.utils.data.DataLoader(Pairs(), batch_size=4))
