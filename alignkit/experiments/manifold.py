"""`alignkit experiment manifold`: which losses leave the data's surface, on points in space that train in a minute.

The experiment of THERMoDPO (arXiv 2608.20011, table 2 and appendix E.1), from notes on the paper. Everything is a
file under the output folder that is made once: a run that was stopped goes on where it was, and several processes
share the work. Every number is a function of (arm, seed): noise is keyed, and one thread keeps the order of sums.
"""

import json
import math
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from alignkit.errors import DataError
from alignkit.experiments.manifold_plan import (
    ARMS,
    COORDINATES,
    SMOKE,
    Arm,
    Plan,
    points_of,
    result_file,
    samples_file,
    score,
)
from alignkit.experiments.manifold_write_up import write_up
from alignkit.files import write_atomically, write_json
from alignkit.progress import progress, say
from alignkit.sharing import one_at_a_time, share_out
from alignkit.training.distributed import lone_worker
from alignkit_kernels import (
    NoiseKey,
    Stream,
    add_keyed_noise,
    keyed_rand,
    keyed_randn,
    losses,
    pair_region_errors,
    region_errors,
)

HIDDEN = 128
DRAWN_AT_ONCE = 100  # steps whose noise is drawn in one call; nothing depends on it
MEASURED_PAIRS = 4096
PRETRAINING, FINE_TUNING, MEASURING, INITIAL = range(4)  # draws of a seed's keyed numbers


def run(out: Path, *, smoke: bool) -> Path:
    """Run, or go on with, the experiment in `out`; returns the written page."""
    worker = lone_worker()
    torch.set_num_threads(1)
    plan = SMOKE if smoke else Plan()
    out = out / "manifold"
    _check_plan(plan, out)
    bases = [weights_file(out, seed) for seed in plan.seeds]
    share_out(bases, lambda i: write_atomically(bases[i], save(_pretrain(plan, plan.seeds[i], show=worker.main))))
    runs = [(arm, seed) for seed in plan.seeds for arm in ARMS]
    results = [result_file(out, arm.name, seed) for arm, seed in runs]
    share_out(results, lambda i: _make(plan, out, *runs[i], show=worker.main))
    with one_at_a_time(out / "page.lock"):
        return write_up(plan, ARMS, out)


def weights_file(out: Path, seed: int) -> Path:
    return out / f"seed-{seed}" / "weights" / "base.safetensors"


def _check_plan(plan: Plan, out: Path) -> None:
    """Results of other sizes or other arms are refused, never mixed."""
    file = out / "plan.json"
    now = json.loads(json.dumps({"plan": asdict(plan), "arms": [asdict(arm) for arm in ARMS]}))
    with one_at_a_time(file.with_suffix(".lock")):
        if not file.exists():
            write_json(file, now)
    if json.loads(file.read_text()) != now:
        raise DataError(f"{out}: holds results of another plan; choose another --out or delete it")


def _pretrain(plan: Plan, seed: int, *, show: bool) -> dict[str, Tensor]:
    network = new_network(seed)

    def loss(uniforms: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        return COORDINATES * losses.sft(_mean_error(network, points_of(uniforms[:, :2], "pairs"), t, noise))

    title = f"manifold: base, seed {seed}"
    _descend(plan, network, loss, seed, PRETRAINING, plan.pretraining, plan.pretraining_rate, math.inf, title, show)
    return network.state_dict()


def _make(plan: Plan, out: Path, arm: Arm, seed: int, *, show: bool) -> None:
    """Fine-tune, sample and measure one arm: its samples first, so that a result never lacks them."""
    start = time.monotonic()
    base, policy = new_network(seed), new_network(seed)
    for network in (base, policy):
        network.load_state_dict(load_file(weights_file(out, seed)))
    base.requires_grad_(False)

    def loss(uniforms: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        winners, losers = points_of(uniforms[:, :2], "winners"), points_of(uniforms[:, 2:], "losers")
        return arm_loss(arm, policy, base, winners, losers, t, noise)

    if arm.trained:
        title = f"manifold: {arm.title}, seed {seed}"
        _descend(plan, policy, loss, seed, FINE_TUNING, plan.fine_tuning, plan.rate, plan.clip, title, show)
    points = sample(policy, plan.samples, plan.euler, seed)
    numbers: dict[str, Any] = score(points) | errors(policy, seed)
    samples = samples_file(out, arm.name, seed)
    samples.parent.mkdir(exist_ok=True)
    write_atomically(samples, save({"points": points}))
    numbers |= {"seconds": round(time.monotonic() - start, 1), "made_on": f"{processor()}, torch {torch.__version__}"}
    write_json(result_file(out, arm.name, seed), numbers)
    say(f"manifold: {arm.title}, seed {seed}: {numbers['strict']:.3f}")


def processor() -> str:
    """What the CPU calls itself, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def new_network(seed: int) -> nn.Sequential:
    """The velocity at (x_t, t), [B, 4] to [B, 3]: three linear layers, with torch's usual start from keyed numbers."""
    sizes = (COORDINATES + 1, HIDDEN, HIDDEN, COORDINATES)
    layers: list[nn.Module] = []
    for number, (inside, outside) in enumerate(pairwise(sizes)):
        layer = nn.utils.skip_init(nn.Linear, inside, outside)
        key = NoiseKey(seed, torch.tensor([number]), INITIAL, Stream.TRAINING)
        values = (2 * keyed_rand((1, inside * outside + outside), key)[0] - 1) / inside**0.5
        with torch.no_grad():
            layer.weight.copy_(values[: inside * outside].view(outside, inside))
            layer.bias.copy_(values[inside * outside :])
        layers += [layer, nn.SiLU()]
    return nn.Sequential(*layers[:-1])


def velocity(network: nn.Module, states: Tensor, t: Tensor) -> Tensor:
    """[B, 3, 1, 1] from states of that shape and t [B]."""
    return network(torch.cat((states[..., 0, 0], t[:, None]), dim=1))[..., None, None]


def path_rows(t: Tensor) -> Tensor:
    """Flow matching's coefficients [B, 4]: x_t = (1 − t) x0 + t ε, to predict ε − x0."""
    return torch.stack((1 - t, t, torch.ones_like(t), -torch.ones_like(t)), dim=1)


def _batches(plan: Plan, seed: int, draw: int, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Each step's uniform numbers [batch, 5] (t, then two a point) and noise [batch, 3, 1, 1], the same in all arms."""
    for first in range(0, steps, DRAWN_AT_ONCE):
        ids = torch.arange(first, min(first + DRAWN_AT_ONCE, steps))
        uniforms = keyed_rand((len(ids), plan.batch, 5), NoiseKey(seed, ids, draw, Stream.TIMESTEP))
        noise = keyed_randn((len(ids), plan.batch, COORDINATES, 1, 1), NoiseKey(seed, ids, draw, Stream.TRAINING))
        yield from zip(uniforms, noise, strict=True)


def _descend(
    plan: Plan,
    network: nn.Module,
    loss: Callable[[Tensor, Tensor, Tensor], Tensor],
    seed: int,
    draw: int,
    steps: int,
    rate: float,
    clip: float,
    title: str,
    show: bool,
) -> None:
    """Adam on the mean of loss(uniform numbers [batch, 4], t [batch], noise [batch, 3, 1, 1])."""
    optimizer = torch.optim.Adam(network.parameters(), rate, fused=True)
    with progress(title, steps, show=show) as bar:
        for uniforms, noise in _batches(plan, seed, draw, steps):
            optimizer.zero_grad()
            loss(uniforms[:, 1:], uniforms[:, 0].contiguous(), noise).mean().backward()
            nn.utils.clip_grad_norm_(network.parameters(), clip)
            optimizer.step()
            bar.advance()


def arm_loss(
    arm: Arm, policy: nn.Module, base: nn.Module, winners: Tensor, losers: Tensor, t: Tensor, noise: Tensor
) -> Tensor:
    """The loss of each pair, fp64 [B]; winner and loser share noise and t. FlowDPO's β is β · (1 − t)²: velocity errors
    times (1 − t)² are those of the noise."""
    if arm.beta is None and arm.tau is None:
        return arm.sft * COORDINATES * losses.sft(_mean_error(policy, winners, t, noise))
    rows = path_rows(t)
    states = torch.cat([add_keyed_noise(points, rows, noise) for points in (winners, losers)])
    both = torch.cat((t, t))
    pred_w, pred_l = velocity(policy, states, both).chunk(2)
    with torch.no_grad():
        ref_w, ref_l = velocity(base, states, both).chunk(2)
    sums = pair_region_errors(pred_w, pred_l, winners, losers, rows, noise, reference_w=ref_w, reference_l=ref_l)
    assert sums.gap_w is not None and sums.gap_l is not None
    error_w, gap_w, gap_l = (x[:, 0] / COORDINATES for x in (sums.error_w, sums.gap_w, sums.gap_l))
    if arm.tau is not None:
        beta = head_beta(1 / arm.tau)
        logits = losses.logits_of(gap_w, gap_l, beta)
        return arm.tau * losses.winner_guarded(logits, error_w, beta, (1 - t) ** 2)
    assert arm.beta is not None
    logits = (1 - t) ** 2 * losses.logits_of(gap_w, gap_l, head_beta(arm.beta))
    return losses.dpo(logits) + arm.sft * COORDINATES * losses.sft(error_w)


def head_beta(beta: float) -> float:
    """The heads' β for the paper's, whose logit has −β (gap_w − gap_l) of summed gaps: ours takes half of β and means
    over the three coordinates, so 2 · 3 times as much. A temperature τ of summed errors is a β of 1 / τ."""
    return 2 * COORDINATES * beta


def _mean_error(network: nn.Module, points: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    rows = path_rows(t)
    pred = velocity(network, add_keyed_noise(points, rows, noise), t)
    return region_errors(pred, points, rows, noise).error[:, 0] / COORDINATES


@torch.no_grad()
def sample(network: nn.Module, count: int, steps: int, seed: int) -> Tensor:
    """Points [count, 3] by Euler's steps from t = 1 to 0; a seed's arms start from the same noise."""
    key = NoiseKey(seed, torch.arange(count), 0, Stream.EVALUATION)
    points = keyed_randn((count, COORDINATES), key)
    for step in range(steps, 0, -1):
        t = torch.full((count,), step / steps)
        points = points - velocity(network, points[..., None, None], t)[..., 0, 0] / steps
    return points


@torch.no_grad()
def errors(network: nn.Module, seed: int) -> dict[str, float]:
    """Mean summed errors on winners and losers that no step trained on, the same for a seed's arms."""
    ids = torch.arange(MEASURED_PAIRS)
    uniforms = keyed_rand((MEASURED_PAIRS, 5), NoiseKey(seed, ids, MEASURING, Stream.TIMESTEP))
    noise = keyed_randn((MEASURED_PAIRS, COORDINATES, 1, 1), NoiseKey(seed, ids, MEASURING, Stream.TRAINING))
    t = uniforms[:, 0].contiguous()
    found = {}
    for name, side, columns in (("error_w", "winners", slice(1, 3)), ("error_l", "losers", slice(3, 5))):
        error = _mean_error(network, points_of(uniforms[:, columns], side), t, noise)
        found[name] = COORDINATES * error.mean().item()
    return found
