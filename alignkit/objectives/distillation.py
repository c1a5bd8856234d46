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
from alignkit.stores.pairs import PairBatch, Side
from alignkit_kernels import PathState


def with_next_steps(law: Law, batch: PairBatch, epochs: Tensor) -> PairBatch:
    """`batch` with x̂0 of a step in the place of each side's video, where the side has states: at the row of the
    student's schedule that the law draws for the pair in `epochs`, int64 [B], from the state there to the next one.

    With the state as the input an objective's target is then the student's, and its noise, which state and x̂0 imply, ε̂.
    Sides have states at all rows of the schedule; the last one's next is the video itself.
    """
    assert batch.side_w is not None and batch.side_l is not None and batch.path_rows is not None
    points = law.draw(batch.ids, epochs, batch.path_rows)
    assert points.rows is not None
    drawn = points.rows.tolist()
    ends = torch.stack([law.schedule.coefficients[points.rows + step, :2] for step in (0, 1)], dim=1)

    def aimed(videos: Tensor, side: Side) -> Tensor:
        paths = [path for path in side.paths if path]
        if len(paths) < len(videos):
            return videos
        rows = zip(paths, videos, drawn, strict=True)
        both = [(path.states[row], (*path.states, video.cpu())[row + 1]) for path, video, row in rows]
        here, there = (torch.stack(states).to(videos.device) for states in zip(*both, strict=True))
        return split_states(here, there, ends)[0]

    return replace(batch, winner=aimed(batch.winner, batch.side_w), loser=aimed(batch.loser, batch.side_l))


def distillation_states(
    model: VideoModel, law: Law, batch: PairBatch, epochs: Tensor, dtype: torch.dtype
) -> tuple[PairBatch, States]:
    """The winners' states, which their teacher visited, at a step that the law draws for each pair in `epochs`, int64
    [B]; and the batch with x̂0 in the winners' place, so that `supervised_loss` has the student's target."""
    taught = with_next_steps(law, batch, epochs)
    assert batch.side_w is not None
    points, device = law.draw(batch.ids, epochs, batch.path_rows), batch.winner.device
    assert points.rows is not None
    paths = [path for path in batch.side_w.paths if path]
    here = torch.stack([path.states[row] for path, row in zip(paths, points.rows.tolist(), strict=True)]).to(device)
    states = States(
        inputs=here.to(dtype),
        timesteps=points.timesteps.to(device, torch.float32),
        text=model.pad_text(batch.text).to(device, dtype),
        coefficients=points.coefficients.to(device),
        noise_w=PathState(here),
        weight=points.weight,
        rows=points.rows,
    )
    return taught, states
