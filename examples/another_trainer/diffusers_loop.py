"""LocalDPO in a plain diffusers training loop: a small Wan transformer and its frozen copy.

python examples/another_trainer/diffusers_loop.py
"""

import copy

import torch
from diffusers import WanTransformer3DModel
from toy import CHANNELS, Pairs

from alignkit_kernels import NoiseKey, Stream, add_keyed_noise, flow_coefficients, keyed_rand, preference_loss

SEED, BETA = 0, 500.0

torch.manual_seed(SEED)
policy = WanTransformer3DModel(
    patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=CHANNELS, out_channels=CHANNELS,
    text_dim=16, freq_dim=32, ffn_dim=32, num_layers=1, rope_max_seq_len=32,
)  # fmt: skip
reference = copy.deepcopy(policy).requires_grad_(False)
optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-4)
text = torch.zeros(4, 8, 16)  # where a prompt's embedding goes

for epoch in range(2):
    for batch in torch.utils.data.DataLoader(Pairs(), batch_size=4):
        ids = batch["pair_id"]
        # flow matching: x_t = (1 - sigma) x0 + sigma noise, and the network predicts noise - x0
        sigma = keyed_rand(ids.shape, NoiseKey(SEED, ids, epoch, Stream.TIMESTEP))
        rows = flow_coefficients(sigma)
        noise = NoiseKey(SEED, ids, epoch, Stream.TRAINING)  # the pair's: both sides get the same

        noisy = torch.cat([add_keyed_noise(batch[side], rows, noise) for side in ("clean_w", "clean_l")])
        inputs = {
            "hidden_states": noisy,
            "timestep": 1000 * sigma.repeat(2),
            "encoder_hidden_states": text.repeat(2, 1, 1),
        }
        pred = policy(**inputs).sample  # winners first: its halves are read where they are
        with torch.no_grad():
            ref_w, ref_l = reference(**inputs).sample.chunk(2)

        got = preference_loss(
            pred, reference_w=ref_w, reference_l=ref_l, clean_w=batch["clean_w"], clean_l=batch["clean_l"],
            coefficients=rows, noise_w=noise, regions=batch["mask"], strength=batch["strength"], beta=BETA,
        )  # fmt: skip
        got.loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        print(f"epoch {epoch} loss {got.loss.item():.5f} logit {got.logits_region.mean().item():+.5f}")
