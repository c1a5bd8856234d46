"""LocalDPO in a loop under FSDP2, policy and reference both sharded.

    torchrun --nproc-per-node 2 examples/another_trainer/fsdp2_loop.py        (or plain python for one process)

The reference is sharded as the policy is: only then do the two agree bit for bit at the first step, and every logit
is exactly 0 there. Predictions leave the network as plain tensors, which is what the loss takes.
"""

import copy
import os

import torch
from torch.distributed.fsdp import fully_shard
from toy import Denoiser, Pairs

from alignkit_kernels import NoiseKey, Stream, add_keyed_noise, flow_coefficients, keyed_rand, preference_loss

SEED, BETA = 0, 500.0

for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}.items():
    os.environ.setdefault(name, value)
os.environ.setdefault("MASTER_PORT", "29535")
kind = "cuda" if torch.cuda.is_available() else "cpu"
device = torch.device(kind, int(os.environ["LOCAL_RANK"])) if kind == "cuda" else torch.device(kind)
torch.distributed.init_process_group("nccl" if kind == "cuda" else "gloo")
mesh = torch.distributed.device_mesh.init_device_mesh(kind, (int(os.environ["WORLD_SIZE"]),))

torch.manual_seed(SEED)
policy = Denoiser().to(device)
reference = copy.deepcopy(policy).requires_grad_(False)
for network in (policy, reference):
    fully_shard(network, mesh=mesh)
optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)

pairs = Pairs()
sampler = torch.utils.data.distributed.DistributedSampler(pairs, shuffle=False)
for epoch in range(2):
    for batch in torch.utils.data.DataLoader(pairs, batch_size=4, sampler=sampler):
        batch = {name: x.to(device) for name, x in batch.items()}
        ids, clean_w, clean_l = batch["pair_id"], batch["clean_w"], batch["clean_l"]
        sigma = keyed_rand(ids.shape, NoiseKey(SEED, ids, epoch, Stream.TIMESTEP))
        rows = flow_coefficients(sigma)
        noise = NoiseKey(SEED, ids, epoch, Stream.TRAINING)
        noisy = torch.cat([add_keyed_noise(clean, rows, noise) for clean in (clean_w, clean_l)])

        pred = policy(noisy, sigma.repeat(2))
        with torch.no_grad():
            ref_w, ref_l = reference(noisy, sigma.repeat(2)).chunk(2)
        got = preference_loss(
            pred, reference_w=ref_w, reference_l=ref_l, clean_w=clean_w, clean_l=clean_l, coefficients=rows,
            noise_w=noise, regions=batch["mask"], beta=BETA,
        )  # fmt: skip
        got.loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if torch.distributed.get_rank() == 0:
            print(f"epoch {epoch} loss {got.loss.item():.5f} logit {got.logits_region.mean().item():+.5f}", flush=True)

torch.distributed.destroy_process_group()
