"""The four noise sources in one picture: a plane of two-element "videos", its known field, and one sampled video."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from alignkit.experiments.paths import STEPS, KnownField, known_world
from alignkit.schedules import Schedule, one_step
from alignkit.schedules.inversion import invert

CENTRES = torch.tensor([[-1.0, 0.9], [1.2, 0.7], [0.2, -1.2]])
START, FRESH, REAL = torch.tensor([[1.9, -1.5]]), torch.tensor([[-2.0, -0.4]]), torch.tensor([[-0.8, 0.7]])
SHOWN_ROW = 11  # where the states are compared: s = 0.71


def draw_paths(panel: Any) -> None:
    """Draw on a matplotlib axes: where one sampled video's training states lie by each source, at one noise level."""
    schedule = known_world("wan", samples=2).law.schedule
    field = KnownField(CENTRES, schedule.timesteps, schedule.coefficients[:-1])

    def predict(state: Tensor, timesteps: Tensor) -> Tensor:
        return field(state, timesteps)[0]

    path = _sample(predict, schedule)
    video = path[-1]
    inverted: dict[int, Tensor] = {}
    invert(REAL, predict, schedule, 0, inverted.__setitem__)
    back = torch.cat([inverted[row] for row in range(STEPS + 1)])
    a, s = schedule.coefficients[SHOWN_ROW, :2].tolist()

    panel.plot(*CENTRES.T, "o", color="0.85", markersize=34, zorder=0)
    panel.plot(*path.T, ".-", color="C3", label="path: where the sampler was")
    panel.plot(*path[SHOWN_ROW], "o", color="C3", markersize=10)
    for noise, colour, name in ((START[0], "C1", "initial: its own noise"), (FRESH[0], "C0", "shared: fresh noise")):
        panel.plot(*torch.stack([noise, video]).T, "--", color=colour, linewidth=1, label=name)
        panel.plot(*(a * video + s * noise), "o", color=colour, markersize=10)
    panel.plot(*back.T, ".:", color="C2", label="inversion of a real video")
    panel.plot(*back[SHOWN_ROW], "o", color="C2", markersize=10)
    panel.plot(*torch.stack([START[0], FRESH[0]]).T, "s", color="black", markersize=5)
    panel.plot(*torch.stack([video, REAL[0]]).T, "*", color="black", markersize=12)
    panel.set(xticks=[], yticks=[], xlim=(-2.6, 2.6), ylim=(-3.1, 2.0))
    panel.set_title("from noise (squares) to videos (stars); discs: training states", fontsize=10)
    panel.legend(fontsize=8, loc="lower left")


def _sample(predict: Callable[[Tensor, Tensor], Tensor], schedule: Schedule) -> Tensor:
    states = [START]
    for row in range(STEPS):
        prediction = predict(states[-1], schedule.timesteps[row : row + 1])
        states.append(one_step(states[-1], prediction, *schedule.coefficients[row : row + 2]))
    return torch.cat(states)
