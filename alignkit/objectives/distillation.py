"""Distillation of a few-step student from the paths that its teacher's sampler walked.

At two neighbouring steps of the student's, i and j, the teacher was at x_i and x_j. A first-order solver takes the
student from the one to the other if its prediction at x_i is c_i·ε̂ + d_i·x̂0, where a·x̂0 + s·ε̂ is x_i with i's (a, s)
and x_j with j's: one formula for every parameterisation. The teacher's guidance is part of its path, so the student
needs none. Progressive distillation (arXiv 2202.00512) has this target for two of the teacher's steps at a time.
"""

from dataclasses import replace

import torch
from torch import Tensor

from alignkit.models import VideoModel
from alignkit.objectives.laws import Law
from alignkit.objectives.states import States
from alignkit.schedules import split_states
from alignkit.stores.pairs import PairBatch
from alignkit_kernels import PathState


def distillation_states(
    model: VideoModel, law: Law, batch: PairBatch, epochs: Tensor, dtype: torch.dtype
) -> tuple[PairBatch, States]:
    """The winners' states, which their teacher visited, at a step that the law draws for each pair in `epochs`, int64
    [B]; and the batch with x̂0 in the winners' place, so that `supervised_loss` has the student's target.

    Winners must have states, and those of the next of the student's steps behind them. A state's noise is the one that
    it and x̂0 imply, which is ε̂.
    """
    assert batch.side_w is not None and batch.path_rows is not None
    points = law.draw(batch.ids, epochs, batch.path_rows)
    assert points.rows is not None
    column = (batch.path_rows == points.rows[:, None]).long().argmax(dim=1).tolist()
    device = batch.winner.device
    here, there = (
        torch.stack([getattr(path, name)[i] for path, i in zip(batch.side_w.paths, column, strict=True)]).to(device)
        for name in ("states", "following")
    )
    ends = torch.stack([law.schedule.coefficients[points.rows + step, :2] for step in (0, 1)], dim=1)
    clean, _ = split_states(here, there, ends)
    states = States(
        inputs=here.to(dtype),
        timesteps=points.timesteps.to(device, torch.float32),
        text=model.pad_text(batch.text).to(device, dtype),
        coefficients=points.coefficients.to(device),
        noise_w=PathState(here),
        weight=points.weight,
        rows=points.rows,
    )
    return replace(batch, winner=clean), states
