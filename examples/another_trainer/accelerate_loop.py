"""LocalDPO in a loop under accelerate.

    accelerate launch examples/another_trainer/accelerate_loop.py        (or plain python)

Noise is keyed by the pair's id, so any number of processes trains on the same numbers.
"""

import copy

import torch
from accelerate import Accelerator
from toy import Denoiser, Pairs

from alignkit_kernels import NoiseKey, Stream, add_keyed_noise, flow_coefficients, keyed_rand, preference_loss

SEED, BETA = 0, 500.0

accelerator = Accelerator()
torch.manual_seed(SEED)
model = Denoiser()
reference = copy.deepcopy(model).requires_grad_(False).to(accelerator.device)
loader = torch.utils.data.DataLoader(Pairs(), batch_size=4)
model, optimizer, loader = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3), loader)

for epoch in range(2):
    for batch in loader:
        ids, clean_w, clean_l = batch["pair_id"], batch["clean_w"], batch["clean_l"]
        sigma = keyed_rand(ids.shape, NoiseKey(SEED, ids, epoch, Stream.TIMESTEP))
        rows = flow_coefficients(sigma)
        noise = NoiseKey(SEED, ids, epoch, Stream.TRAINING)
        noisy = torch.cat([add_keyed_noise(clean, rows, noise) for clean in (clean_w, clean_l)])

        pred = model(noisy, sigma.repeat(2))
        with torch.no_grad(), accelerator.autocast():
            ref_w, ref_l = reference(noisy, sigma.repeat(2)).chunk(2)
        got = preference_loss(
            pred, reference_w=ref_w, reference_l=ref_l, clean_w=clean_w, clean_l=clean_l, coefficients=rows,
            noise_w=noise, regions=batch["mask"], beta=BETA,
        )  # fmt: skip
        accelerator.backward(got.loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        accelerator.print(f"epoch {epoch} loss {got.loss.item():.5f} logit {got.logits_region.mean().item():+.5f}")
