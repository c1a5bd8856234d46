"""LocalDPO as `compute_loss` of a transformers.Trainer, which TRL's trainers are.

python examples/another_trainer/trl_like_trainer.py

Rewards are logged by the names that TRL has for them.
"""

import copy
import tempfile

import torch
from toy import Denoiser, Pairs
from transformers import Trainer, TrainingArguments

from alignkit_kernels import NoiseKey, Stream, add_keyed_noise, flow_coefficients, keyed_rand, preference_loss

SEED, BETA = 0, 500.0


class PairTrainer(Trainer):
    def __init__(self, model, **settings):
        super().__init__(model, **settings)
        self.reference = copy.deepcopy(model).requires_grad_(False).to(self.args.device).eval()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        ids, clean_w, clean_l = inputs["pair_id"], inputs["clean_w"], inputs["clean_l"]
        epoch = int(self.state.epoch or 0)
        sigma = keyed_rand(ids.shape, NoiseKey(SEED, ids, epoch, Stream.TIMESTEP))
        rows = flow_coefficients(sigma)
        noise = NoiseKey(SEED, ids, epoch, Stream.TRAINING)
        noisy = torch.cat([add_keyed_noise(clean, rows, noise) for clean in (clean_w, clean_l)])

        pred = model(noisy, sigma.repeat(2))
        with torch.no_grad():
            ref_w, ref_l = self.reference(noisy, sigma.repeat(2)).chunk(2)
        got = preference_loss(
            pred, reference_w=ref_w, reference_l=ref_l, clean_w=clean_w, clean_l=clean_l, coefficients=rows,
            noise_w=noise, regions=inputs["mask"], beta=BETA,
        )  # fmt: skip
        chosen, rejected = -BETA / 2 * got.gap_w, -BETA / 2 * got.gap_l
        rewards = {"rewards/chosen": chosen, "rewards/rejected": rejected, "rewards/margins": chosen - rejected}
        self.log({name: value.mean().item() for name, value in rewards.items()})
        print(f"epoch {epoch} loss {got.loss.item():.5f} logit {got.logits_region.mean().item():+.5f}")
        return (got.loss, {"logits": got.logits_region}) if return_outputs else got.loss


if __name__ == "__main__":
    torch.manual_seed(SEED)
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder, num_train_epochs=2, per_device_train_batch_size=4, learning_rate=1e-3, lr_scheduler_type="constant",
            save_strategy="no", logging_strategy="no", report_to=[], remove_unused_columns=False, disable_tqdm=True,
            seed=SEED,
        )  # fmt: skip
        PairTrainer(Denoiser(), args=settings, train_dataset=Pairs()).train()
