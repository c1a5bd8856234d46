"""LocalDPO in a loop under DeepSpeed ZeRO-3, policy and reference both partitioned.

    deepspeed examples/another_trainer/deepspeed_loop.py        (or torchrun, or plain python for one process)

The reference goes through an engine with the policy's configuration: only then do the two agree bit for bit at
the first step, and every logit is exactly 0 there.
"""

import copy
import os

import deepspeed
import torch
from toy import Denoiser, Pairs

from alignkit_kernels import NoiseKey, Stream, add_keyed_noise, flow_coefficients, keyed_rand, preference_loss

SEED, BETA = 0, 500.0
CONFIG = {
    "train_micro_batch_size_per_gpu": 4,
    "zero_optimization": {"stage": 3},
    "gradient_clipping": 1.0,
    "bf16": {"enabled": torch.cuda.is_available()},
}

for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}.items():
    os.environ.setdefault(name, value)
os.environ.setdefault("MASTER_PORT", "29533")
deepspeed.init_distributed("nccl" if torch.cuda.is_available() else "gloo", verbose=False)

torch.manual_seed(SEED)
model = Denoiser()
frozen = copy.deepcopy(model).requires_grad_(False)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
policy, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=CONFIG)
reference, *_ = deepspeed.initialize(model=frozen, config=CONFIG)
reference.eval()

pairs = Pairs()
sampler = torch.utils.data.distributed.DistributedSampler(pairs, shuffle=False)
for epoch in range(2):
    for batch in torch.utils.data.DataLoader(pairs, batch_size=4, sampler=sampler):
        batch = {name: x.to(policy.device) for name, x in batch.items()}
        ids, clean_w, clean_l = batch["pair_id"], batch["clean_w"], batch["clean_l"]
        sigma = keyed_rand(ids.shape, NoiseKey(SEED, ids, epoch, Stream.TIMESTEP))
        rows = flow_coefficients(sigma)
        noise = NoiseKey(SEED, ids, epoch, Stream.TRAINING)
        noisy = torch.cat([add_keyed_noise(clean, rows, noise) for clean in (clean_w, clean_l)])
        noisy = noisy.to(next(policy.parameters()).dtype)

        pred = policy(noisy, sigma.repeat(2))
        with torch.no_grad():
            ref_w, ref_l = reference(noisy, sigma.repeat(2)).chunk(2)
        got = preference_loss(
            pred, reference_w=ref_w, reference_l=ref_l, clean_w=clean_w, clean_l=clean_l, coefficients=rows,
            noise_w=noise, regions=batch["mask"], beta=BETA,
        )  # fmt: skip
        policy.backward(got.loss)
        policy.step()
        if policy.global_rank == 0:
            print(f"epoch {epoch} loss {got.loss.item():.5f} logit {got.logits_region.mean().item():+.5f}", flush=True)

torch.distributed.destroy_process_group()
