"""One full-parameter LocalDPO training step: plain diffusers with an eager loss, and alignkit, in turn in one run.

    python benchmarks/step.py                                    the tiny models, on this machine
    python benchmarks/step.py --methods plain alignkit alignkit-cached     with errors computed beforehand too
    python benchmarks/step.py --models wan2.1-1.3b cogvideox-2b  real architectures with random weights: one GPU
    python benchmarks/step.py --models cogvideox-5b --methods alignkit     where both do not fit in memory together

plain: diffusers' model in fp32 under autocast, a second full copy in bf16, noise by torch.randn, the loss in
eager fp32, torch's AdamW. alignkit: DeepSpeed ZeRO-3 (or --preset zero2) with bf16 weights and fp32 masters, a
copy as reference, keyed noise and the fused loss. alignkit-cached: the same without a second model, with the
reference's errors from `alignkit cache-reference`, whose cost stands beside it. All on the same attention backend with
gradient checkpointing, on the same latents. On a CPU everything is fp32 and the loss takes its reference path. Rows go
to a CSV.
"""

import argparse
import copy
import csv
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from machine import ROOT, machine

from alignkit.config import load_config
from alignkit.models import family_module, load_model, shipped_model, working_dtype
from alignkit.models.attention import set_attention
from alignkit.objectives.laws import start_law
from alignkit.stores.folders import pairs_folder
from alignkit.stores.pairs import Pair, PairStore, write_block, write_texts
from alignkit.stores.store import StoreInfo, open_for_building
from alignkit.training.cache import build_cache, with_cache
from alignkit.training.distributed import start_process
from alignkit.training.engine import load_network
from alignkit.training.run import load_rows, start_run
from alignkit.training.weights import open_start

TINY = {"tiny-wan": "wan-tiny-localdpo.yaml", "tiny-cogvideox": "cogvideox-tiny-localdpo.yaml"}
REAL = ("wan2.1-1.3b", "cogvideox-2b", "cogvideox-5b", "wan2.1-14b")
PARTS = ("data", "reference", "forward", "loss", "backward", "optimizer")
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}  # bf16, dense, as the maker says
PAIRS = 4
BUCKET = ("deepspeed.config={zero_optimization: {reduce_bucket_size: 200000}}",)  # else 2 GB beside 26 MB of weights


class Clock:
    """Seconds by part of a step; on a GPU each part waits for the device, the same for every method."""

    def __init__(self):
        self.seconds = dict.fromkeys(PARTS, 0.0)

    def timed(self, part: str, call, *arguments, **options):
        start = self._now()
        result = call(*arguments, **options)
        self.seconds[part] += self._now() - start
        return result

    @staticmethod
    def _now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()


class Timed:
    """A network whose forwards are timed as `part`."""

    def __init__(self, network, clock: Clock, part: str):
        self.network, self.clock, self.part = network, clock, part
        self.module = getattr(network, "module", network)

    def __call__(self, **inputs):
        return self.clock.timed(self.part, self.network, **inputs)


class TimedAnswer:
    """A reference whose forwards are timed."""

    def __init__(self, reference, clock: Clock):
        self.reference, self.clock = reference, clock

    def answer(self, batch, states):
        return self.clock.timed("reference", self.reference.answer, batch, states)


def random_folder(name: str, folder: Path, device: torch.device) -> str:
    """The real architecture as a diffusers folder: scheduler and pipeline index of the family, random weights."""
    architecture = json.loads((ROOT / "configs" / "architectures" / f"{name}.json").read_text())
    family = "wan" if architecture["_class_name"].startswith("Wan") else "cogvideox"
    target = folder / name
    (target / "scheduler").mkdir(parents=True)
    for file in ("model_index.json", "scheduler/scheduler_config.json"):
        (target / file).write_text((shipped_model(family) / file).read_text())
    (target / "vae").mkdir()  # settings alone, those of the class: the latents are drawn
    vae = {"wan": "AutoencoderKLWan", "cogvideox": "AutoencoderKLCogVideoX"}[family]
    (target / "vae" / "config.json").write_text(json.dumps({"_class_name": vae}))
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            network = family_module(family).build_transformer(architecture)
    finally:
        torch.set_default_dtype(before)
    network.to("cpu").save_pretrained(target / "transformer")
    return str(target)


def write_pairs(config, model, network_config, folder: Path) -> PairStore:
    """A store of random latents in the configuration's size; their values do not matter to the time."""
    data = config.data
    shape = model.latent_shape(data.num_frames, data.height, data.width)
    channel = shape.index(network_config["in_channels"])
    vae = model.fingerprint("vae")
    open_for_building(folder, StoreInfo("local_dpo", model.family, None, vae, "", pairs=PAIRS, block_size=PAIRS))
    generator = torch.Generator().manual_seed(0)
    width = network_config.get("text_dim") or network_config["text_embed_dim"]
    pairs = []
    for number in range(PAIRS):
        winner, other = torch.randn(2, *shape, generator=generator).unbind()
        mask = torch.zeros([1 if axis == channel else size for axis, size in enumerate(shape)], dtype=torch.uint8)
        mask[..., shape[-2] // 3 : shape[-2] // 2, shape[-1] // 3 : 2 * shape[-1] // 3] = 1
        loser = torch.where(mask.bool(), other, winner)
        text = torch.randn(config.model.max_sequence_length, width, generator=generator)
        pairs.append(Pair(number, "random", "random", text, winner, loser, mask, 45, 0.9))
    write_block(folder, 0, pairs)
    write_texts(folder, pairs[0].text, pairs[0].text)
    return PairStore(folder)


class Alignkit:
    """The step of `alignkit train`."""

    networks = 4  # forwards' worth: three for the policy's forward and backward, one for the reference

    def __init__(self, config, process, model, store):
        start = open_start(config, model)
        model.transformer, self.attention = load_network(config, process, model, start)
        self.run = start_run(config, process, model, store, start)

    def step(self, rows: list[int], clock: Clock) -> float:
        def data():
            batch = load_rows(self.run.store, rows, self.run.process.device)
            return batch, self.run.states(batch, torch.zeros(len(rows), dtype=torch.int64))

        batch, states = clock.timed("data", data)
        inside = sum(clock.seconds[part] for part in ("forward", "reference"))
        policy, reference = Timed(self.run.policy, clock, "forward"), TimedAnswer(self.run.reference, clock)
        start = clock._now()
        result = replace(self.run, policy=policy, reference=reference).loss(batch, states)
        inside = sum(clock.seconds[part] for part in ("forward", "reference")) - inside
        clock.seconds["loss"] += clock._now() - start - inside
        clock.timed("backward", self.run.policy.backward, result.loss)
        clock.timed("optimizer", self.run.policy.step)
        return result.loss.item()


class Cached(Alignkit):
    """The same with `reference.strategy: cached`, and the errors of every pair computed first."""

    networks = 3

    def __init__(self, config, process, model, store):
        config = with_cache(config, "benchmark")
        start = time.perf_counter()
        folder = build_cache(config, process)
        self.build_seconds = time.perf_counter() - start
        written = sorted(file.stat().st_mtime for file in folder.glob("block-*.arrow"))  # a pair each
        self.build_seconds_per_pair = (written[-1] - written[0]) / (len(written) - 1)
        super().__init__(config, process, model, store)


class Plain:
    """What one writes around diffusers without us."""

    networks = 4

    def __init__(self, config, process, model, store):
        self.config, self.process, self.model, self.store = config, process, model, store
        dtype = working_dtype(config.model, process.device)
        self.predict = family_module(model.family).predict
        self.policy = load_model(config.model, with_encoders=False).transformer.to(process.device)
        self.reference = copy.deepcopy(self.policy).to(dtype)
        for network in (self.policy, self.reference):
            self.attention = set_attention(network, config.model.attention, process.device, dtype)
        self.policy.requires_grad_(True).train().enable_gradient_checkpointing()
        train = config.train
        self.optimizer = torch.optim.AdamW(
            self.policy.parameters(), lr=train.learning_rate, betas=train.betas, weight_decay=train.weight_decay
        )
        on_gpu = process.device.type == "cuda"
        self.autocast = (lambda: torch.autocast("cuda", torch.bfloat16)) if on_gpu else nullcontext

    def step(self, rows: list[int], clock: Clock) -> float:
        def data():
            batch = load_rows(self.store, rows, self.process.device)
            points = start_law(self.config, self.model).draw(batch.ids, torch.zeros(len(rows), dtype=torch.int64))
            timesteps = points.timesteps
            coefficients = points.coefficients.to(self.process.device, torch.float32)
            a, s, c, d = (coefficients[:, i].view(-1, *[1] * (batch.winner.ndim - 1)) for i in range(4))
            noise = torch.randn_like(batch.winner)
            states = torch.cat([a * batch.winner + s * noise, a * batch.loser + s * noise])
            targets = c * noise + d * batch.winner, c * noise + d * batch.loser
            text = self.model.pad_text(batch.text).to(self.process.device).repeat(2, 1, 1)
            inputs = states, timesteps.to(self.process.device, torch.float32).repeat(2), text
            return batch, inputs, targets

        batch, inputs, targets = clock.timed("data", data)
        with self.autocast():
            with torch.no_grad():
                reference = clock.timed("reference", self.predict, self.reference, *inputs)
            pred = clock.timed("forward", self.predict, self.policy, *inputs)
        loss = clock.timed("loss", self.loss, pred.float(), reference.float(), targets, batch)
        clock.timed("backward", loss.backward)

        def update():
            torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.config.train.max_grad_norm)
            self.optimizer.step()
            self.optimizer.zero_grad()

        clock.timed("optimizer", update)
        return loss.item()

    def loss(self, pred, reference, targets, batch):
        objective = self.config.objective
        low, high = objective.strength_range
        axes = list(range(1, pred.ndim))
        mask = batch.mask.expand_as(batch.winner).float()
        gaps, masked = [], []
        for p, r, y in zip(pred.chunk(2), reference.chunk(2), targets, strict=True):
            difference = (p - y).square() - (r - y).square()
            gaps.append(difference.mean(axes))
            masked.append((difference * mask).sum(axes) / mask.sum(axes))
        error_w = (pred.chunk(2)[0] - targets[0]).square().mean(axes)
        eta = ((batch.strength - low) / (high - low)).to(pred.device)
        z_global = -objective.beta / 2 * (gaps[0] - gaps[1])
        z_region = -objective.beta / 2 * (1 + eta) * (masked[0] - masked[1])
        softplus = torch.nn.functional.softplus
        terms = objective.weight_region * softplus(-z_region) + objective.weight_global * softplus(-z_global)
        return (terms + objective.weight_sft * error_w).mean()


METHODS = {"plain": Plain, "alignkit": Alignkit, "alignkit-cached": Cached}


def held_bytes() -> int:
    """Of all tensors: weights, masters, moments, gradients."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    gc.collect()
    tensors = [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor) and not x.is_meta]
    storages = [x.untyped_storage() for x in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def forward_flops(model, network, config, store, process) -> float:
    """Floating-point operations of one forward of a pair's two videos, counted by torch."""
    from torch.utils.flop_counter import FlopCounterMode

    batch = load_rows(store, [0], process.device)
    states = torch.cat([batch.winner, batch.loser])
    dtype = next(network.parameters()).dtype
    text = model.pad_text(batch.text).to(process.device, dtype).repeat(2, 1, 1)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        family_module(model.family).predict(
            network, states.to(dtype), torch.full((2,), 500.0, device=process.device), text
        )
    return counter.get_total_flops()


def measure(name: str, methods: list[str], preset: str, rounds: int, folder: Path, process) -> Iterator[list[dict]]:
    """A row for each method after every timed round: what is stopped has measured what it has."""
    path = f"model.path={random_folder(name, folder, process.device)}" if name in REAL else "model.path=tiny"
    file = ROOT / "configs" / (TINY.get(name) or f"{name}-localdpo.yaml")
    config = load_config(file, [path, f"output.dir={folder / name}-run", f"pairs.folder={folder / name}-pairs",
                                "train.global_batch_size=1", "train.micro_batch_size=1", f"train.steps={PAIRS}",
                                f"deepspeed.preset={preset}",
                                "train.checkpointing=full", *(BUCKET if name in TINY else ())])  # fmt: skip
    model = load_model(config.model, with_transformer=False, with_encoders=False)
    local = model.local_folder()
    network_config = json.loads((local / "transformer/config.json").read_text())
    store = write_pairs(config, model, network_config, pairs_folder(config, "train"))
    tokens = store[0].winner.numel() // network_config["in_channels"] // 4
    built, resident, flops = {}, {}, None
    for method in methods:
        before = held_bytes()
        built[method] = METHODS[method](config, process, copy.copy(model), store)
        built[method].step([0], Clock())  # after which the moments are there
        resident[method] = held_bytes() - before
        if method == "plain":
            flops = forward_flops(model, built[method].reference, config, store, process)
    clocks: dict[str, list[Clock]] = {method: [] for method in methods}
    peaks = dict.fromkeys(methods, 0.0)
    for number in range(rounds + 1):  # the first is warm-up
        for method in methods if number % 2 else methods[::-1]:
            clock = Clock()
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            loss = built[method].step([number % PAIRS], clock)
            assert loss == loss, f"{name}, {method}: the loss is not a number"
            if torch.cuda.is_available():
                others = sum(size for other, size in resident.items() if other != method)
                peaks[method] = max(peaks[method], torch.cuda.max_memory_allocated() - others)
            print(f"{name} {method}: step {number} of {rounds}, {sum(clock.seconds.values()):.3g} s", file=sys.stderr)
            if number:
                clocks[method].append(clock)
        if number:
            yield rows_of(name, methods, preset, built, clocks, peaks, resident, flops, tokens)


def rows_of(name, methods, preset, built, clocks, peaks, resident, flops, tokens) -> list[dict]:
    top = next((peak for key, peak in PEAK_FLOPS.items() if key in machine()["device"]), None)
    rows = []
    for method in methods:
        parts = {part: statistics.median(clock.seconds[part] for clock in clocks[method]) for part in PARTS}
        totals = [sum(clock.seconds.values()) for clock in clocks[method]]
        step = statistics.median(totals)
        rows.append({
            "model": name, "method": method, "preset": preset * (method != "plain"),
            "attention": built[method].attention,
            "tokens": tokens, "steps": len(totals),
            "step_s": f"{step:.4g}", "fastest_s": f"{min(totals):.4g}", "slowest_s": f"{max(totals):.4g}",
            **{f"{part}_s": f"{seconds:.4g}" for part, seconds in parts.items()},
            "pairs_per_s": f"{1 / step:.4g}", "speed_up": "",
            "mfu": f"{built[method].networks * flops / step / top:.3f}" if top and flops else "",
            "peak_gb": f"{peaks[method] / 1e9:.4g}" if torch.cuda.is_available() else "",
            "held_gb": f"{resident[method] / 1e9:.4g}", "step_to_copied": "", "memory_to_copied": "",
            "build_s": "", "build_s_per_pair": "",
        })  # fmt: skip
    by_method = {row["method"]: row for row in rows}
    for method in methods:
        row = by_method[method]
        if "plain" in methods and method != "plain":
            row["speed_up"] = f"{ratio(by_method['plain'], row, 'step_s'):.3g}"
        if method == "alignkit-cached":
            row["build_s"] = f"{built[method].build_seconds:.4g}"
            row["build_s_per_pair"] = f"{built[method].build_seconds_per_pair:.4g}"
            if "alignkit" in methods:
                memory = "peak_gb" if row["peak_gb"] else "held_gb"
                by_round = [[sum(clock.seconds.values()) for clock in clocks[name]] for name in (method, "alignkit")]
                # of one round: what else the machine does comes and goes
                ratios = [one / other for one, other in zip(*by_round, strict=True)]
                row["step_to_copied"] = f"{statistics.median(ratios):.3g}"
                row["memory_to_copied"] = f"{ratio(row, by_method['alignkit'], memory):.3g}"
    return rows


def write_rows(path: Path, rows: list[dict]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*machine(), *rows[0]])
        writer.writeheader()
        writer.writerows(machine() | row for row in rows)


def ratio(one: dict, other: dict, column: str) -> float:
    return float(one[column]) / float(other[column])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = [name for name, file in TINY.items() if (ROOT / "configs" / file).exists()]
    parser.add_argument("--models", nargs="+", default=known, choices=[*known, *REAL], metavar="MODEL")
    parser.add_argument("--methods", nargs="+", default=["plain", "alignkit"], choices=METHODS)
    parser.add_argument("--preset", default="zero3", choices=("zero2", "zero3"), help="alignkit's, of DeepSpeed")
    parser.add_argument("--rounds", type=int, default=7, help="timed steps of each method, after one to warm up")
    parser.add_argument("--csv", type=Path, default=ROOT / "out" / "benchmarks" / "steps.csv")
    given = parser.parse_args()
    process = start_process()
    given.csv.parent.mkdir(parents=True, exist_ok=True)
    done: list[dict] = []
    for name in given.models:
        rows: list[dict] = []
        with tempfile.TemporaryDirectory() as folder:
            for rows in measure(name, given.methods, given.preset, given.rounds, Path(folder), process):
                write_rows(given.csv, done + rows)
        done += rows
        for row in rows:
            parts = "  ".join(f"{part} {float(row[f'{part}_s']) / float(row['step_s']):.0%}" for part in PARTS)
            print(f"{name:15} {row['method']:15} {row['step_s']:>8} s a step  {parts}  {row['attention']}"
                  + (f"  {row['speed_up']}x" if row["speed_up"] else ""), flush=True)  # fmt: skip
            if row["build_s"]:
                print(f"{'':15} errors computed in {row['build_s']} s, {row['build_s_per_pair']} s a pair"
                      + (f"; step {row['step_to_copied']} and memory {row['memory_to_copied']} of those with a copy"
                         if row["step_to_copied"] else ""), flush=True)  # fmt: skip
    print(f"rows: {given.csv}")


if __name__ == "__main__":
    main()
