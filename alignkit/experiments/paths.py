"""`alignkit experiment paths`: how far training states lie from those that a sampler visits, where the field is known.

The data are Gaussians around a few points, so the best prediction at any state has a closed form: the network's part is
played by it, everything else (scheduler, sampler, noise sources, keys) is what trains real models.
"""

import csv
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from alignkit.config import Config, Family, load_config, shipped_config
from alignkit.models import VideoModel, family_module, load_model
from alignkit.models.folder import unwatched
from alignkit.objectives.laws import OnSchedule, PathPoints
from alignkit.objectives.states import SOURCES
from alignkit.progress import say
from alignkit.schedules import Schedule, one_step
from alignkit.schedules.inversion import EVALUATIONS, invert, round_trip_error
from alignkit.stores.origins import GIVEN, Origin, Trajectory
from alignkit.stores.pairs import PairBatch, Side
from alignkit.tiny.clips import render_clip
from alignkit_kernels import NoiseKey, Stream, keyed_randn

SHAPE, CENTRES, SPREAD = (2, 2, 4, 4), 4, 0.3
STEPS, SAMPLES, SEED = 20, 64, 7
CLIPS, INVERTED_STEPS = 4, (10, 20, 40)


class KnownField(nn.Module):
    """In the transformer's place: what a perfectly trained network would predict, for data that are Gaussians of
    standard deviation SPREAD around `centres`, [K, ...], each as likely, computed in fp64.

    rows: the path's coefficients, fp64 [N, 4], by the N timesteps that it may be asked at.
    """

    def __init__(self, centres: Tensor, timesteps: Tensor, rows: Tensor):
        super().__init__()
        self.centres, self.timesteps, self.rows = centres.double(), timesteps, rows
        self.config = SimpleNamespace(use_rotary_positional_embeddings=False)

    def forward(self, hidden_states: Tensor, timestep: Tensor, **_: Any) -> tuple[Tensor]:
        place = int((self.timesteps - timestep[0].item()).abs().argmin())
        a, s, c, d = self.rows[place].tolist()
        x, variance = hidden_states.double(), a * a * SPREAD**2 + s * s
        off = x[:, None] - a * self.centres  # [B, K, ...]
        share = torch.softmax(-off.flatten(2).square().sum(dim=2) / (2 * variance), dim=1)
        means = self.centres + a * SPREAD**2 / variance * off
        clean = (share.view(*share.shape, *[1] * (x.dim() - 1)) * means).sum(dim=1)
        noise = (x - a * clean) / s
        return ((c * noise + d * clean).to(hidden_states.dtype),)


@dataclass(frozen=True)
class World:
    """A family's scheduler around a known field, and videos sampled from it with all states of their paths.

    states: fp32 [N + 1, B, ...], the network's input at every step, and the video.
    """

    config: Config
    model: VideoModel
    law: OnSchedule
    states: Tensor

    @property
    def videos(self) -> Tensor:
        return self.states[-1]

    def predict(self, state: Tensor, timesteps: Tensor) -> Tensor:
        empty = torch.zeros(len(state), 1, 1)
        return family_module(self.model.family).predict(self.model.transformer, state, timesteps, empty)


def known_world(family: Family, solver: str = "first_order", samples: int = SAMPLES) -> World:
    """A world of `samples` videos by the model's own solver or the first-order one."""
    config = _config(family, solver)
    model = load_model(config.model, with_transformer=False, with_encoders=False)
    law = OnSchedule(config, model)
    centres = keyed_randn((CENTRES, *SHAPE), NoiseKey(SEED, torch.arange(CENTRES), 0, Stream.EVALUATION))
    model.transformer = KnownField(centres, law.schedule.timesteps, law.schedule.coefficients[:-1])
    seen: list[Tensor] = []
    empty = torch.zeros(samples, 1, 1)
    model.sample(
        keyed_randn((samples, *SHAPE), NoiseKey(SEED, torch.arange(samples), 1, Stream.ROLLOUT)),
        empty,
        empty,
        num_steps=STEPS,
        guidance=1.0,
        solver=solver,
        watch=lambda row, state: seen.append(state.float()),
    )
    return World(config, model, law, torch.stack(seen))


def _config(family: Family, solver: str) -> Config:
    sampling = f"rollout={{solver: {solver}, num_inference_steps: {STEPS}, seed: {SEED}}}"
    return load_config(shipped_config(f"{family}-tiny-localdpo.yaml"), [sampling])


@dataclass(frozen=True)
class _AtRow:
    """The law that draws one row alone."""

    model: VideoModel
    schedule: Schedule
    row: int

    def draw(self, ids: Tensor, epochs: Tensor, among: Tensor | None = None) -> PathPoints:
        rows = torch.full_like(ids, self.row)
        return PathPoints(self.schedule.coefficients[rows], self.schedule.timesteps[rows], rows)


def batch_of(world: World, paths: list[Trajectory], kind: str = "rollout") -> PairBatch:
    """The world's videos as pairs, the first half winners, with a trajectory each at all rows."""
    half = len(world.videos) // 2
    recipe: dict[str, Any] = {}
    origins = [
        Origin("rollout", (SEED, i, 1, int(Stream.ROLLOUT)), recipe=recipe) if kind == "rollout" else GIVEN
        for i in range(2 * half)
    ]
    return PairBatch(
        ids=torch.arange(half),
        winner=world.videos[:half],
        loser=world.videos[half : 2 * half],
        mask=torch.ones(half, 1, *SHAPE[1:], dtype=torch.uint8),
        text=[torch.zeros(1, 1)] * half,
        strength=None,
        path_rows=torch.arange(STEPS).expand(half, -1),
        side_w=Side(origins[:half], [*paths[:half]]),
        side_l=Side(origins[half:], [*paths[half : 2 * half]]),
    )


def sampled_paths(world: World) -> list[Trajectory]:
    """What the sampler was seen at, of every video."""
    return [Trajectory(world.states[:-1, i], world.states[1:, i]) for i in range(len(world.videos))]


def inverted_paths(world: World) -> list[Trajectory]:
    """What inversion finds, of every video."""
    found: dict[int, Tensor] = {}
    invert(world.videos, world.predict, world.law.schedule, 0, found.__setitem__)
    states = torch.stack([found[row] for row in range(STEPS)])
    return [Trajectory(states[:, i], error=0.0) for i in range(len(world.videos))]


def distances(world: World, source: str, paths: list[Trajectory], *, between: bool = False) -> Tensor:
    """Of the states that `source` trains at, at every row: the root-mean-square distance to the sampler's own states,
    as a share of theirs, fp64 [N]. With `between`, of the points between each row and the next, to where a first-order
    solver passes."""
    noise = world.config.noise.model_copy(update={"source": source, "path_between": between})
    config = world.config.model_copy(update={"noise": noise})
    batch = batch_of(world, paths, "given" if source == "inversion" else "rollout")
    result = []
    for row in range(STEPS):
        law: Any = _AtRow(world.model, world.law.schedule, row)
        noised = SOURCES[source](config, law, batch, torch.zeros(len(batch), dtype=torch.int64))
        shown = torch.cat([noised.winner, noised.loser]).double()
        true = world.states[row].double()
        if between:
            prediction = world.predict(world.states[row], world.law.schedule.timesteps[row].expand(len(true)))
            here = world.law.schedule.coefficients[row]
            points = noised.coefficients.repeat(2, 1)
            true = torch.cat(
                [one_step(true[i : i + 1], prediction[i : i + 1].double(), here, points[i]) for i in range(len(true))]
            )
        result.append(((shown - true).square().mean() / true.square().mean()).sqrt())
    return torch.stack(result)


def chord_errors(world: World) -> Tensor:
    """What the known field, the best prediction there is, misses of the training target at the sampler's own states:
    the mean squared error as a share of the target's square, at every row, fp64 [N].

    The target there is the chord, what leads straight to the video that the path ends in; the field is the path's
    tangent. With fresh noise a state says nothing of its video but what the field knows; here each state has one video,
    and a network can learn all that the field misses.
    """
    videos, result = world.videos.double(), []
    for row, (a, s, c, d) in enumerate(world.law.schedule.coefficients[:-1].tolist()):
        state = world.states[row]
        target = c * (state.double() - a * videos) / s + d * videos
        tangent = world.predict(state, world.law.schedule.timesteps[row].expand(len(state))).double()
        result.append((tangent - target).square().mean() / target.square().mean())
    return torch.stack(result)


def measure(family: Family) -> dict[str, Tensor]:
    """Distances by source, each fp64 [N]."""
    world = known_world(family)
    paths = sampled_paths(world)
    return {
        "shared": distances(world, "shared", paths),
        "initial": distances(world, "initial", paths),
        "inversion": distances(world, "inversion", inverted_paths(world)),
        "path": distances(world, "path", paths),
        "path_between": distances(world, "path", paths, between=True),
    }


@torch.no_grad()
def measure_inversions(family: Family) -> dict[int, dict[int, float]]:
    """By steps and evaluations a step: the mean relative round-trip error of CLIPS drawn clips by the small model."""
    config = _config(family, "first_order")
    model = load_model(config.model)
    clips = [render_clip(SEED, index) for index in range(CLIPS)]
    videos = model.encode_video(torch.stack([torch.from_numpy(clip.frames) for clip in clips]))
    text = model.pad_text(model.encode_text([clip.caption for clip in clips]))
    result: dict[int, dict[int, float]] = {}
    for steps in INVERTED_STEPS:
        schedule = model.schedule(steps)

        def predict(state: Tensor, timesteps: Tensor) -> Tensor:
            return family_module(family).predict(model.transformer, state, timesteps, text)

        result[steps] = {}
        for evaluations in (1, EVALUATIONS):
            top = invert(videos, predict, schedule, 0, unwatched, evaluations)
            result[steps][evaluations] = round_trip_error(videos, top, predict, schedule, 0).mean().item()
    return result


def run(out: Path) -> Path:
    """Measure both families; write results.csv, page.md and, where matplotlib is installed, paths.png into out/page."""
    folder = out / "page"
    folder.mkdir(parents=True, exist_ok=True)
    families: tuple[Family, ...] = ("wan", "cogvideox")
    measured = {family: measure(family) for family in families}
    noise = {family: known_world(family, samples=2).law.schedule.coefficients[:-1, 1] for family in measured}
    with (folder / "results.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["family", "source", "step", "noise_level", "distance"])
        for family, by_source in measured.items():
            for source, values in by_source.items():
                for row, value in enumerate(values.tolist()):
                    writer.writerow([family, source, row, f"{noise[family][row]:.6f}", f"{value:.3e}"])
    lines = [
        "| source | " + " | ".join(f"{family}: mean, largest" for family in measured) + " |",
        "| --- | --- | --- |",
    ]
    for source in measured["wan"]:
        cells = [f"{values[source].mean():.2g}, {values[source].max():.2g}" for values in measured.values()]
        lines.append(f"| `{source}` | " + " | ".join(cells) + " |")
    inverted = {family: measure_inversions(family) for family in measured}
    back = ["| steps | " + " | ".join(inverted) + " |", "| --- | --- | --- |"]
    for steps in INVERTED_STEPS:
        cells = [f"{errors[steps][EVALUATIONS]:.2g} ({errors[steps][1]:.2g})" for errors in inverted.values()]
        back.append(f"| {steps} | " + " | ".join(cells) + " |")
    title = "# Training states and the sampler's own, where the field is known: what the experiment printed"
    note = f"{SAMPLES} videos of {STEPS} steps each, first-order solver; distances as shares of the states' norm."
    missed = {family: chord_errors(known_world(family)) for family in measured}
    chords = "At the sampler's own states the known field misses " + ", ".join(
        f"{error.mean():.0%} of the target's square for {family} ({error[0]:.0%} at the first step)"
        for family, error in missed.items()
    )
    picture = _plot(measured, noise, folder / "paths.png")
    page = folder / "page.md"
    pictures = ["", f"![distances]({picture})"] if picture else []
    errors = (
        f"Relative round-trip errors of {CLIPS} drawn clips by the small models, means; {EVALUATIONS} evaluations of "
    )
    errors += "the network a step, in brackets 1."
    text = [title, "", *lines, "", note, *pictures, "", f"{chords}: all of it can be learnt.", "", *back, "", errors]
    page.write_text("\n".join(text) + "\n", encoding="utf-8")
    say(f"experiment: {page}")
    return page


def _plot(measured: dict[Family, dict[str, Tensor]], noise: dict[Family, Tensor], file: Path) -> str | None:
    try:
        import matplotlib
    except ImportError:
        say("no plot: it needs matplotlib (pip install 'alignkit[bench]')")
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from alignkit.experiments.paths_picture import draw_paths

    figure, panels = plt.subplots(1, 3, figsize=(14, 4.4), layout="constrained", width_ratios=(1.25, 1, 1))
    draw_paths(panels[0])
    for panel, (family, by_source) in zip(panels[1:], measured.items(), strict=True):
        for number, (source, values) in enumerate(by_source.items()):
            panel.plot(noise[family], values.clamp(min=1e-8), ".-", color=f"C{number}", label=source)
        panel.set(yscale="log", ylim=(1e-8, 3), xlabel="noise level s (0 is drawn at 1e-8)")
        panel.set_title(f"{family}: distance to the sampler's state", fontsize=10)
        panel.grid(alpha=0.3)
    panels[1].legend(fontsize=8, loc="center left", bbox_to_anchor=(0.0, 0.35))
    figure.savefig(file, dpi=110)
    plt.close(figure)
    return file.name
