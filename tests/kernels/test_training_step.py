"""A step of the main job's training, unchanged, on the kernels."""

import copy
from pathlib import Path

import pytest
import torch

from alignkit_kernels import count_launches

CONFIG = Path(__file__).parents[2] / "configs" / "wan-tiny-localdpo.yaml"


def test_a_training_step_runs_on_the_kernels(path, device, tmp_path):
    pytest.importorskip("diffusers", reason="the training engine is an extra; the kernels do without it")
    from alignkit.config import load_config
    from alignkit.models import family_module, load_model
    from alignkit.objectives.laws import start_law
    from alignkit.objectives.preference import preference_loss
    from alignkit.objectives.states import training_states
    from alignkit.stores.pairs import PairBatch

    config = load_config(CONFIG, [f"data.videos={tmp_path}", f"output.dir={tmp_path}"])
    model = load_model(config.model, with_encoders=False)
    policy = model.transformer.to(device).requires_grad_(True)
    reference = copy.deepcopy(policy).requires_grad_(False)
    shape = (2, policy.config.in_channels, 2, 4, 4)
    generator = torch.Generator().manual_seed(0)
    winner = torch.randn(shape, generator=generator)
    mask = torch.zeros(2, 1, *shape[2:], dtype=torch.uint8)
    mask[..., 1:3] = 1
    loser = torch.where(mask.bool(), torch.randn(shape, generator=generator), winner)
    text = [torch.zeros(3, policy.config.text_dim)] * 2
    latents = (x.to(device) for x in (winner, loser, mask))
    batch = PairBatch(torch.tensor([4, 9]), *latents, text, torch.tensor([0.75, 0.9], dtype=torch.float64))

    with count_launches() as launched:
        epochs = torch.zeros(2, dtype=torch.int64)
        states = training_states(config, model, start_law(config, model), batch, epochs, text[0], torch.float32)
        answers = [
            family_module("wan").predict(network, states.inputs, states.timesteps, states.text).chunk(2)
            for network in (policy, reference)
        ]
        result = preference_loss(config.objective, *answers, batch, states)
        result.loss.backward()
    if path == "triton":
        fused = {"sum_tiles_kernel", "preference_head_kernel", "pair_region_errors_backward_kernel"}
        # timesteps are drawn where the ids are: on the host, where the interpreter alone runs kernels
        drawn = {"keyed_kernel"} if device.type == "cpu" else set()
        assert launched.keys() == {"add_noise_kernel", "pair_region_errors_kernel", *fused, *drawn}
    else:
        assert not launched
    assert (result.logits["region"] == 0).all() and (result.logits["global"] == 0).all()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in policy.parameters())
