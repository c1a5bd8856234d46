"""Draws the documentation's pictures anew, from real runs of the small Wan2.1:

    alignkit demo --out RUNS/demo
    alignkit train wan-tiny-localdpo data.videos=RUNS/demo/clips pairs.folder=RUNS/demo/pairs output.dir=RUNS/fast \\
        train.learning_rate=3e-3 objective.weight_sft=0
    alignkit rollout docs/pictures/rollouts.yaml output.dir=RUNS/apo
    alignkit rank run docs/pictures/rollouts.yaml output.dir=RUNS/apo
    python docs/pictures/draw.py RUNS [NAME ...]
"""

import json
import sys
import textwrap
from pathlib import Path

import matplotlib
import numpy as np
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch

from alignkit.config import load_config
from alignkit.localdpo.build import guided_network, guided_text
from alignkit.localdpo.corruption import regenerate
from alignkit.media.videos import read_video
from alignkit.models import family_module, load_model
from alignkit.report.pictures import most_different, read_pair, with_mask
from alignkit.report.run import read_run
from alignkit.stores.pairs import PairStore
from alignkit.stores.rollouts import RolloutStore
from alignkit_kernels import NoiseKey, Stream, add_keyed_noise, flow_coefficients

HERE = Path(__file__).parent
ROUND = "round,pad=0.1,rounding_size=0.5"
INK, GREY, GOOD, BAD, BASE = "#1b1b2f", "#6c6c80", "#1a7f5a", "#c2255c", "#5c6bc0"
plt.rcParams |= {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "figure.facecolor": "white"}


def show(panel, frame: np.ndarray, title: str = "", colour: str = INK) -> None:
    """A frame uint8 [H, W, 3], its pixels as they are."""
    panel.imshow(frame, interpolation="nearest")
    panel.set(xticks=[], yticks=[])
    for side in panel.spines.values():
        side.set_visible(False)
    if title:
        panel.set_title(title, fontsize=10, color=colour, pad=4)


def write(name: str, figure, **options) -> None:
    figure.savefig(HERE / f"{name}.png", dpi=110, bbox_inches="tight", pad_inches=0.08, **options)
    plt.close(figure)


def _gain(row: dict) -> float:
    """Of a sample by alignment: less of a fault, more of the prompt."""
    return row["fault_base"] - row["fault_aligned"] + row["followed_aligned"] - row["followed_base"]


def hero(runs: Path) -> None:
    """Two pairs and two samples, by rules: the pairs whose regions changed most; the sample that gained most, and the
    one in the middle."""
    folder = runs / "demo"
    run = read_run(folder)
    pairs = [read_pair(file) for file in run.pairs]
    pairs.sort(key=lambda pair: -np.abs(pair.winner.astype(float) - pair.loser).mean())
    rows = [row for row in run.sample_rows if row.get("fault_base") is not None]
    rows.sort(key=_gain, reverse=True)
    samples = [rows[0], rows[len(rows) // 2]]

    figure = plt.figure(figsize=(12, 4.6))
    grid = figure.add_gridspec(2, 6, width_ratios=[1, 1, 1, 0.18, 1, 1], wspace=0.06, hspace=0.1)
    for i, (pair, sample) in enumerate(zip(pairs, samples, strict=False)):
        at = most_different(pair.winner, pair.loser)
        videos = pair.winner, with_mask(pair.winner, pair.mask), pair.loser
        titles = ("winner: a real video", "region", "loser: region redrawn") if i == 0 else ("",) * 3
        colours = GOOD, INK, BAD
        for j, (video, title, colour) in enumerate(zip(videos, titles, colours, strict=True)):
            show(figure.add_subplot(grid[i, j]), video[at], title, colour)
        both = [read_video(folder / "samples" / sample[name]).numpy() for name in ("base", "aligned")]
        at = most_different(*both)
        titles = ("base", "aligned, same noise") if i == 0 else ("", "")
        for j, (video, title, colour) in enumerate(zip(both, titles, (BASE, GOOD), strict=True)):
            show(figure.add_subplot(grid[i, 4 + j]), video[at], title, colour)
    figure.text(0.335, 0.965, "what it learns from", ha="center", fontsize=12, color=INK)
    figure.text(0.765, 0.965, "what comes out", ha="center", fontsize=12, color=INK)
    write("hero", figure)


def _pair_and_model(runs: Path):
    config = load_config(runs / "demo")
    store = PairStore(runs / "demo" / "pairs" / "heldout")
    pairs = [store[i] for i in range(len(store))]
    pair = max(pairs, key=lambda pair: (pair.winner - pair.loser).abs().mean().item())
    return config, pair, load_model(config.model)


def pair(runs: Path) -> None:
    """How a loser comes to be: what the sampler carries, decoded."""
    config, pair, model = _pair_and_model(runs)
    states: dict[int, torch.Tensor] = {}
    predict = guided_network(config, model, guided_text(config, model, [pair.prompt], torch.device("cpu")))
    key = NoiseKey(config.pairs.seed, torch.tensor([pair.id]), 0, Stream.CORRUPTION)
    schedule = model.schedule(config.pairs.num_inference_steps)
    loser = regenerate(pair.winner[None], pair.mask[None], predict, schedule, key, pair.steps, states.__setitem__)
    mask = model.frames_of_mask(pair.mask).numpy()
    winner = model.decode_video(pair.winner[None])[0].numpy()
    first, last = min(states), max(states)
    middle = [first, first + (last - first) // 2, last - 2]
    columns = [("winner", GOOD, winner), ("region", INK, with_mask(winner, mask))]
    columns += [(f"before step {i + 1}", GREY, model.decode_video(states[i])[0].numpy()) for i in middle]
    columns += [("loser", BAD, model.decode_video(loser)[0].numpy())]
    frames = [0, len(winner) // 2, len(winner) - 1]
    figure, panels = plt.subplots(3, len(columns), figsize=(12, 6.1), gridspec_kw={"wspace": 0.05, "hspace": 0.05})
    for j, (title, colour, video) in enumerate(columns):
        for i, at in enumerate(frames):
            show(panels[i, j], video[at], title if i == 0 else "", colour)
    for i, at in enumerate(frames):
        panels[i, 0].set_ylabel(f"frame {at}", color=GREY)
    write("localdpo-pair", figure)
    print(
        f"pair {pair.id}: {pair.prompt}; {pair.steps} of {len(schedule)} steps; "
        f"equal outside: {torch.equal(loser[0][:, ~pair.mask[0].bool()], pair.winner[:, ~pair.mask[0].bool()])}"
    )


@torch.no_grad()
def loss(runs: Path, draws: int = 64, sigma: float = 0.6) -> None:
    """Where the aligned model predicts better than the base, and where worse: the terms of the gap, cell by cell."""
    config, pair, base = _pair_and_model(runs)
    section = config.model.model_copy(update={"path": str(runs / "demo" / "export")})
    models = [base, load_model(section, with_encoders=False)]
    predict = family_module(config.model.family).predict
    text = base.pad_text(base.encode_text([pair.prompt])).expand(draws, -1, -1)
    rows = flow_coefficients(torch.full((draws,), sigma))
    key = NoiseKey(1, torch.arange(draws), 0, Stream.EVALUATION)
    gaps = []
    for clean in (pair.winner, pair.loser):
        clean = clean.expand(draws, *clean.shape).contiguous()
        noisy = add_keyed_noise(clean, rows, key)
        noise = (noisy - (1 - sigma) * clean) / sigma
        errors = [
            (predict(model.transformer, noisy, torch.full((draws,), 1000 * sigma), text) - (noise - clean)) ** 2
            for model in models
        ]
        gaps.append((errors[1] - errors[0]).mean(dim=(0, 1)).numpy())
    mask = base.frames_of_mask(pair.mask).numpy()
    frames = range(mask.shape[0])
    most = max(np.percentile(np.abs(gap), 97) for gap in gaps)  # a few cells are beyond it
    figure, panels = plt.subplots(2, len(frames), figsize=(11, 4.6), layout="constrained")
    for i, (gap, name) in enumerate(zip(gaps, ("winner", "loser"), strict=True)):
        for j in frames:
            image = panels[i, j].imshow(gap[j], cmap="RdBu_r", vmin=-most, vmax=most, interpolation="nearest")
            panels[i, j].contour(mask[j], levels=[0.5], colors="#ff00aa", linewidths=1.5)
            panels[i, j].set(xticks=[], yticks=[])
            if i == 0:
                panels[i, j].set_title(f"latent frame {j}", fontsize=9, color=GREY)
        panels[i, 0].set_ylabel(name, fontsize=11, color=(GOOD, BAD)[i])
    bar = figure.colorbar(image, ax=panels, shrink=0.8, extend="both")
    bar.set_label("squared error, aligned − base", color=GREY)
    write("localdpo-loss", figure)
    inside = mask.astype(bool)
    for gap, name in zip(gaps, ("winner", "loser"), strict=True):
        print(f"{name}: mean gap {gap[inside].mean():+.4f} inside, {gap[~inside].mean():+.4f} outside")


def curves(runs: Path) -> None:
    """The demo's curves, and those of a rate ten times too high without the anchor."""
    files = {name: runs / name / "train" / "metrics.jsonl" for name in ("demo", "fast")}
    both = {name: [json.loads(line) for line in file.open()] for name, file in files.items()}
    titles = {"demo": "as the demo has it", "fast": "ten times the rate,\nno SFT term"}
    figure, panels = plt.subplots(2, 4, figsize=(12.5, 5), sharex=True)
    for row, (name, lines) in enumerate(both.items()):
        steps = [line["step"] for line in lines]
        drawn = [
            [("region/accuracy", "inside the region", BASE)],
            [("global/gap_w", "winner", GOOD), ("global/gap_l", "loser", BAD)],
            [("error_w", "winner's own error", GOOD)],
            [("region/saturated", "inside the region", BASE)],
        ]
        for panel, curves in zip(panels[row], drawn, strict=True):
            for key, label, colour in curves:
                panel.plot(steps, smooth([line[key] for line in lines]), color=colour, label=label, linewidth=1.8)
            panel.grid(alpha=0.25)
        panels[row, 1].axhline(0, color=GREY, linewidth=0.8)
        panels[row, 1].legend(frameon=False, fontsize=8)
        panels[row, 0].axhline(0.5, color=GREY, linewidth=0.8, linestyle=":")
        panels[row, 0].set_ylim(0.4, 1.03)
        panels[row, 3].set_ylim(-0.03, 1.03)
        panels[row, 0].set_ylabel(titles[name], color=(GOOD, BAD)[row])
    heads = "accuracy", "gaps: error − reference's", "winner's error", "saturated share"
    for panel, title in zip(panels[0], heads, strict=True):
        panel.set_title(title, fontsize=10)
    for panel in panels[1]:
        panel.set_xlabel("step")
    figure.tight_layout()
    write("curves", figure)


def smooth(values: list[float], over: int = 5) -> np.ndarray:
    """The mean of the last few, fewer at the start."""
    return np.array([np.mean(values[max(0, i + 1 - over) : i + 1]) for i in range(len(values))])


def rollouts(runs: Path) -> None:
    """The rollouts of one prompt, who won, and states on the best one's path."""
    folder = runs / "apo"
    config, store = load_config(folder), RolloutStore(folder / "rollouts")
    rows = [json.loads(line) for line in (folder / "rankings" / "ranking.jsonl").open()]
    row = max(rows, key=lambda row: row["p"])
    model = load_model(config.model, with_transformer=False)
    of_prompt = [number for number in store.ids if store.prompt_of(number) == row["prompt"]]
    best = store.by_id(row["chosen"])
    figure = plt.figure(figsize=(12, 6.2))
    count = len(of_prompt)
    figure.suptitle(f"“{row['prompt']}”: {count} rollouts from {count} keyed noises", fontsize=11, y=0.97)
    grid = figure.add_gridspec(2, 1, height_ratios=[1, 1], hspace=0.18)
    top = grid[0].subgridspec(2, 2 * len(of_prompt), wspace=0.05, hspace=0.05)
    names = {row["chosen"]: ("the best: winner", GOOD), row["rejected"]: ("the worst: loser", BAD)}
    for j, number in enumerate(of_prompt):
        video = model.decode_video(store.by_id(number).latents[None])[0].numpy()
        title, colour = names.get(number, (f"rollout {number}", GREY))
        for k, at in enumerate((0, 5, 11, len(video) - 1)):
            panel = figure.add_subplot(top[k // 2, 2 * j + k % 2])
            show(panel, video[at], title if k == 0 else "", colour)
    shown = best.path_rows
    bottom = grid[1].subgridspec(1, len(shown) + 1, wspace=0.12)
    steps = config.rollout.num_inference_steps
    for j, (at, state) in enumerate(zip(shown, best.path.states, strict=True)):
        frame = model.decode_video(state[None])[0].numpy()[8]
        show(figure.add_subplot(bottom[j]), frame, f"its state at step {at + 1} of {steps}", GREY)
    video = model.decode_video(best.latents[None])[0].numpy()
    show(figure.add_subplot(bottom[len(shown)]), video[8], "its video", GOOD)
    write("apo-rollouts", figure)


def stages(runs: Path) -> None:
    """Which pairs each stage trains on."""
    rounds = "K rollouts a round"
    entries = [
        ("offline", "pairs that are\nranked already", "the store", "no sampling"),
        (
            "half_online",
            "an anchor: a good video\nagainst a fresh rollout",
            "the anchor wins, or\nthe pair is dropped",
            rounds,
        ),
        ("online", "the best against the worst\nof K fresh rollouts", "a ranker", rounds),
        ("distill", "teacher's states at the\nstudent's few steps", "no preference", "one round"),
        (
            "drift_correction",
            "the teacher's video against\nthe student's, same noise",
            "the teacher wins",
            "rounds, in turn\nwith distillation",
        ),
    ]
    figure, panel = plt.subplots(figsize=(12.5, 3.1))
    panel.set(xlim=(0, 50), ylim=(0, 12))
    panel.axis("off")
    for i, (name, pairs, judge, costs) in enumerate(entries):
        left, colour = 0.2 + 10 * i, (BASE if i < 3 else "#b7791f")
        panel.add_patch(FancyBboxPatch((left, 0.3), 8.6, 10.7, boxstyle=ROUND, fc=colour + "14", ec=colour))
        panel.text(left + 4.3, 10.1, name, ha="center", va="center", fontsize=11, color=colour, family="monospace")
        parts = (8.7, "trains on", pairs), (5.7, "who says which is better", judge), (2.9, "costs", costs)
        for at, head, text in parts:
            panel.text(left + 4.3, at, head, ha="center", va="center", fontsize=7.5, color=GREY)
            panel.text(left + 4.3, at - 0.5, text, ha="center", va="top", fontsize=8.2, color=INK)
        if i:
            panel.annotate("", (left - 0.1, 6), (left - 1.3, 6), arrowprops={"arrowstyle": "->", "color": INK})
    write("apo-stages", figure)


ROOMS = {
    "cli": "the commands", "demo": "all in a row", "commands": "one command each", "doctor": "what happened to a run",
    "planning": "memory, time, disk before", "experiments": "arms, rates, seeds", "stages": "a chain of runs",
    "evaluation": "held-out pairs, samples, verdict", "report": "the HTML page", "rankers": "who is asked",
    "training": "engine, a step, the loop, references, checkpoints, export", "localdpo": "masks, corruption, pairs",
    "apo": "rollouts, their pairs, inversions", "given": "ranked videos",
    "objectives": "noise sources, laws, heads, terms", "stores": "block stores of pairs and rollouts",
    "models": "a family, one file", "schedules": "(a, s, c, d) of samplers",
    "media": "videos, captions, masks", "tiny": "the small models", "config": "every key", "launch": "processes",
    "sharing": "locks", "files": "whole or not at all", "progress": "what is said", "errors": "one line",
    "reference": "docs/reference/",
}  # fmt: skip


def rooms(runs: Path) -> None:
    """The packages by layer, as the architecture's test has them; an arrow points down, never up."""
    import importlib.util

    test = HERE.parents[1] / "tests" / "test_architecture.py"
    spec = importlib.util.spec_from_file_location("architecture", test)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    package = test.parents[1] / "alignkit"

    def lines(name: str) -> int:
        files = [package / f"{name}.py"] if (package / f"{name}.py").exists() else (package / name).rglob("*.py")
        return sum(len(file.read_text().splitlines()) for file in files)

    layers = [sorted(set(layer) & set(ROOMS), key=lambda name: -lines(name)) for layer in reversed(module.LAYERS)]
    layers = [layer for layer in layers if layer]
    figure, panel = plt.subplots(figsize=(12, 1.0 * len(layers) + 1.3))
    panel.set(xlim=(0, 100), ylim=(-1.35, len(layers)))
    panel.axis("off")
    for i, layer in enumerate(layers):
        width = min(100 / len(layer), 40)
        left = 50 - width * len(layer) / 2
        for j, name in enumerate(layer):
            draw_room(panel, left + width * j, len(layers) - 1 - i, width, name, ROOMS[name], lines(name), BASE)
        if i:
            at = len(layers) - i
            panel.annotate("", (50, at - 0.04), (50, at + 0.15), arrowprops={"arrowstyle": "->", "color": GREY})
    kernels = sum(len(file.read_text().splitlines()) for file in (package.parent / "kernels").rglob("*.py"))
    about = "a distribution of its own: keyed noise, errors, losses; torch and triton alone"
    draw_room(panel, 15, -1.3, 70, "alignkit_kernels", about, kernels, BAD)
    write("rooms", figure)


def draw_room(panel, left: float, bottom: float, width: float, name: str, about: str, lines: int, colour: str) -> None:
    corner, style = (left + 0.5, bottom + 0.1), "round,pad=0,rounding_size=0.25"
    box = FancyBboxPatch(corner, width - 1, 0.74, boxstyle=style, mutation_aspect=0.1, fc=colour + "14", ec=colour)
    panel.add_patch(box)
    words = {"ha": "center", "va": "center"}
    panel.text(left + width / 2, bottom + 0.6, name, fontsize=10.5, color=colour, family="monospace", **words)
    room = int(width * 1.25)
    about = about if len(about) <= room else "\n".join(textwrap.wrap(about, room))
    panel.text(left + width / 2, bottom + 0.3, about, fontsize=7, color=INK, **words)
    panel.text(left + width - 0.9, bottom + 0.74, f"{lines:,}", ha="right", va="center", fontsize=6, color=GREY)


PICTURES = {f.__name__: f for f in (hero, pair, loss, curves, rollouts, stages, rooms)}

if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in sys.argv[2:] or PICTURES:
        PICTURES[name](Path(sys.argv[1]))
