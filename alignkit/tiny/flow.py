"""Training of the tiny WanTransformer3DModel by rectified flow matching (arXiv 2209.03003, 2210.02747)."""

from pathlib import Path

import numpy as np
import torch
from diffusers import WanTransformer3DModel

from alignkit.tiny.muon import Muon
from alignkit.tiny.stages import Ema, RunningLog, log, schedule, step_rng, torch_generator, train_steps
from alignkit.tiny.text import CAPTION_LENGTH, TEXT_DIM, WORDINGS

STAGE = 3
FLOW_SHIFT = 3.0
EMPTY_SHARE = 0.1
# The pipeline pads the text to max_sequence_length and does not mask the padding.
TEXT_LENGTHS, TEXT_LENGTH_SHARES = (64, 128, 512), (0.8, 0.15, 0.05)
WORDING_SHARES = (0.8, 0.05, 0.05, 0.05, 0.05)
HELD_OUT_SIGMAS = (0.1, 0.3, 0.5, 0.7, 0.9)


def new_transformer() -> WanTransformer3DModel:
    """An untrained WanTransformer3DModel of 1.09 M parameters for latents [8, 5, 12, 12]."""
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=8,
        out_channels=8,
        text_dim=TEXT_DIM,
        freq_dim=64,
        ffn_dim=384,
        num_layers=4,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )


def shifted(u: torch.Tensor) -> torch.Tensor:
    """S(u) = k·u / (1 + (k − 1)·u) with the flow shift k = 3."""
    return FLOW_SHIFT * u / (1 + (FLOW_SHIFT - 1) * u)


def pad_text(text: torch.Tensor, length: int) -> torch.Tensor:
    """[B, L, D] with zeros appended up to ``length`` tokens."""
    return torch.nn.functional.pad(text, (0, 0, 0, length - text.shape[1]))


def train_flow(
    latents: torch.Tensor,
    combinations: torch.Tensor,
    bank: torch.Tensor,
    empty: torch.Tensor,
    folder: Path,
    *,
    steps: int,
    batch: int,
    peak_rate: float,
    hold: float,
    ema_decay: float,
    held_out: int,
    seed: int,
) -> WanTransformer3DModel:
    """Predict ε − x0 from x_t = (1 − s)·x0 + s·ε at timestep 1000·s; s = S(sigmoid(normal)).

    Args:
        latents: normalised, float32 [N, 8, F', h, w]; the last ``held_out`` are not trained on.
        combinations: int64 [N], each clip's row in ``bank``.
        bank: caption embeddings [wordings, combinations, CAPTION_LENGTH, D].
        empty: the empty prompt's embedding [CAPTION_LENGTH, D].
    """
    torch.manual_seed(seed)
    model = new_transformer()
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and name.startswith("blocks")]
    others = [p for p in model.parameters() if all(p is not q for q in matrices)]
    optimizer = Muon(matrices, others, matrix_rate=peak_rate, other_rate=0.1 * peak_rate)
    ema = Ema(model, ema_decay)
    running = RunningLog("flow", steps)
    trained = len(latents) - held_out
    for step in train_steps("flow", folder, model, optimizer, ema, steps):
        rng = step_rng(seed, STAGE, step)
        generator = torch_generator(rng)
        rows = torch.from_numpy(rng.integers(trained, size=batch))
        wordings = torch.from_numpy(rng.choice(len(WORDINGS), size=batch, p=WORDING_SHARES))
        text = bank[wordings, combinations[rows]]
        dropped = torch.from_numpy(rng.random(batch) < EMPTY_SHARE)
        text = torch.where(dropped[:, None, None], empty, text)
        text = pad_text(text, int(rng.choice(TEXT_LENGTHS, p=TEXT_LENGTH_SHARES)))
        clean = latents[rows]
        noise = torch.randn(clean.shape, generator=generator)
        sigma = shifted(torch.sigmoid(torch.randn(batch, generator=generator)))
        optimizer.scale_rates(schedule(step, steps, hold=hold))
        level = sigma.view(-1, 1, 1, 1, 1)
        out = model((1 - level) * clean + level * noise, 1000 * sigma, text, return_dict=False)[0]
        loss = (out - (noise - clean)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        running.add(step, loss=loss.item(), gradient=norm.item())
        if (step + 1) % 500 == 0 or step + 1 == steps:
            probe = new_transformer()
            probe.load_state_dict(ema.values)
            errors = held_out_errors(probe, latents[trained:], combinations[trained:], bank)
            listed = "  ".join(f"{s}: {e:.4f}" for s, e in zip(HELD_OUT_SIGMAS, errors, strict=True))
            log.info("flow: held-out error, averaged weights: %s  mean %.4f", listed, np.mean(errors))
    model.load_state_dict(ema.values)
    return model.eval()


@torch.no_grad()
def held_out_errors(
    model: WanTransformer3DModel, latents: torch.Tensor, combinations: torch.Tensor, bank: torch.Tensor
) -> list[float]:
    """Mean squared error of the predicted flow at each of ``HELD_OUT_SIGMAS``, always with the same noise."""
    generator = torch.Generator().manual_seed(1234)
    text = bank[0, combinations][:, :CAPTION_LENGTH]
    errors = []
    for sigma in HELD_OUT_SIGMAS:
        noise = torch.randn(latents.shape, generator=generator)
        timestep = torch.full((len(latents),), 1000 * sigma)
        out = model((1 - sigma) * latents + sigma * noise, timestep, text, return_dict=False)[0]
        errors.append((out - (noise - latents)).square().mean().item())
    return errors
