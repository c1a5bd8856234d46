"""The many-step model beside a few-step student, frozen: where it would go from the student's own states."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from alignkit.config import Sampler
from alignkit.models import VideoModel, family_module
from alignkit.objectives.states import States
from alignkit.schedules import split_states


@dataclass(frozen=True)
class Teacher:
    """network: a frozen engine or module. rows: of the sampler's steps, those that the student's are at. weight: of
    `distance` in a pair's loss."""

    model: VideoModel
    network: nn.Module
    sampler: Sampler
    rows: tuple[int, ...]
    weight: float

    def distance(self, prediction: Tensor, states: States, negative: Tensor) -> Tensor:
        """Mean squared distance, fp64 [B], between the student's prediction at its own videos' states, the losers', and
        the one that would take it where the teacher goes from there.

        states: at steps of the student's. negative: the text that the teacher is guided away from, [tokens, D]."""
        target = self.targets(states, negative)
        return (prediction.double() - target.double()).square().flatten(1).mean(dim=1)

    @torch.no_grad()
    def targets(self, states: States, negative: Tensor) -> Tensor:
        """What the student would have to predict there, fp32 [B, ...]: the teacher's steps from a state to the
        student's next one, first-order and guided, and then as `alignkit.objectives.distillation` has it.

        As many forwards for every batch, whatever its steps are: all processes must run equally many.
        """
        assert states.rows is not None
        schedule, device = self.model.schedule(self.sampler.num_steps), states.inputs.device
        ends = torch.tensor((*self.rows, len(schedule)))
        first, last = ends[states.rows], ends[states.rows + 1]
        here = states.inputs.chunk(2)[1].float()
        text = states.text.chunk(2)[1]
        negative = self.model.pad_text([negative]).to(text).expand_as(text)
        state = here
        for step in range(int(ends.diff().max())):
            row = (first + step).clamp(max=len(schedule) - 1)
            timesteps = schedule.timesteps[row].to(device, torch.float32)
            moved = _step(state, self._predict(state, timesteps, text, negative), *(
                _shaped(schedule.coefficients[row + ahead], state) for ahead in (0, 1)
            ))  # fmt: skip
            state = torch.where((first + step < last).to(device).view(-1, *[1] * (state.dim() - 1)), moved, state)
        between = torch.stack([schedule.coefficients[row, :2] for row in (first, last)], dim=1)
        clean, noise = split_states(here, state, between)
        _, _, c, d = _shaped(schedule.coefficients[first], here)
        return c * noise + d * clean

    def _predict(self, state: Tensor, timesteps: Tensor, text: Tensor, negative: Tensor) -> Tensor:
        """The guided prediction, fp32, by one forward of both branches."""
        family, scale, dtype = family_module(self.model.family), self.sampler.guidance, text.dtype
        if scale <= 1:
            return family.predict(self.network, state.to(dtype), timesteps, text).float()
        both = torch.cat([state.to(dtype)] * 2), torch.cat([timesteps] * 2), torch.cat([negative, text])
        away, towards = family.predict(self.network, *both).float().chunk(2)
        if self.sampler.dynamic:
            scales = [family.dynamic_guidance(scale, t, self.sampler.num_steps) for t in timesteps.tolist()]
            each = torch.tensor(scales, device=state.device).view(-1, *[1] * (state.dim() - 1))
            return away + each * (towards - away)
        return away + scale * (towards - away)


def _step(state: Tensor, prediction: Tensor, here: list[Tensor], there: list[Tensor]) -> Tensor:
    """`schedules.one_step` with rows of its own for each of the batch."""
    a, s, c, d = here
    determinant = a * c - s * d
    clean, noise = (c * state - s * prediction) / determinant, (a * prediction - d * state) / determinant
    return there[0] * clean + there[1] * noise


def _shaped(coefficients: Tensor, like: Tensor) -> list[Tensor]:
    """[B, 4] as four tensors that scale `like`, [B, ...]."""
    return [x.to(like).view(-1, *[1] * (like.dim() - 1)) for x in coefficients.unbind(1)]
