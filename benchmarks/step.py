"""One full-parameter LocalDPO training step, rung by rung: plain diffusers with an eager loss, alignkit's defaults, and
what can be switched on beside them; in turn in one run, so that what else the machine does meets all of them.

    python benchmarks/step.py                                    the tiny models, on this machine
    python benchmarks/step.py --models wan2.1-1.3b cogvideox-2b  real architectures with random weights: one GPU
    python benchmarks/step.py --models cogvideox-5b --rungs alignkit     where all do not fit in memory together

plain: diffusers' model in fp32 under autocast, a second full copy in bf16, noise by torch.randn, the loss in eager
fp32, torch's AdamW. alignkit: `alignkit train`'s own step with bf16 weights and fp32 masters, a copy as reference,
keyed noise and the fused loss. + cached: the reference's errors from `alignkit cache-reference`, whose cost stands
beside it, instead of a second model. + selective and + apart each stand on the rung above; torch compiles nothing under
selective checkpointing, so + compile stands on + cached. All on the same attention backend, with gradient checkpointing
and pairs of one store. On a CPU everything is fp32 and the loss takes its reference path. Rows go to a CSV, a picture
of them beside it.
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
from pathlib import Path

import torch
from machine import ROOT, machine
from torch._subclasses.fake_tensor import is_fake  # what a compiled network keeps of its trace

from alignkit.config import Config, changed, load_config
from alignkit.models import family_module, load_model, shipped_model, working_dtype
from alignkit.models.attention import set_attention
from alignkit.objectives.laws import start_law
from alignkit.stores.folders import pairs_folder
from alignkit.stores.pairs import Pair, PairStore, write_block, write_texts
from alignkit.stores.store import StoreInfo, open_for_building
from alignkit.training.cache import build_cache, with_cache
from alignkit.training.distributed import start_process
from alignkit.training.engine import load_network
from alignkit.training.health import Clock
from alignkit.training.run import load_rows, start_run
from alignkit.training.weights import open_start

TINY = {"tiny-wan": "wan-tiny-localdpo.yaml", "tiny-cogvideox": "cogvideox-tiny-localdpo.yaml"}
REAL = ("wan2.1-1.3b", "cogvideox-2b", "cogvideox-5b", "wan2.1-14b")
RUNGS: dict[str, dict] = {  # alignkit's: keys of `train` beside cached errors
    "plain": {},
    "alignkit": {},
    "+ cached": {},
    "+ selective": {"checkpointing": "selective"},
    "+ apart": {"checkpointing": "selective", "branches": "apart"},
    "+ compile": {"compile": True},
}
PARTS = ("data", "reference", "policy", "optimizer")
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}  # bf16, dense, as the maker says
PAIRS = 4
LINEAR = torch.nn.functional.linear  # which ZeRO-3 replaces for a whole process
BUCKET = ("deepspeed.config={zero_optimization: {reduce_bucket_size: 200000}}",)  # else 2 GB beside 26 MB of weights


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
    """The step of `alignkit train`, on one of its rungs."""

    def __init__(self, config: Config, process, model, store, rung: str):
        cached = rung != "alignkit"
        self.networks = 3 if cached else 4  # forwards' worth: the policy's forward and backward, the reference's
        self.cache_seconds: tuple[float, float] | None = None  # in all, and a pair
        config = changed(config, {"train": RUNGS[rung]}, "benchmark")
        if cached:
            own = config.output.dir / rung  # a compiled network's errors are others
            config = changed(with_cache(config, "benchmark"), {"reference": {"cache": str(own)}}, "benchmark")
            start = time.perf_counter()
            folder = build_cache(config, process)
            if rung == "+ cached":
                written = sorted(file.stat().st_mtime for file in folder.glob("block-*.arrow"))  # a pair each
                a_pair = (written[-1] - written[0]) / (len(written) - 1)
                self.cache_seconds = time.perf_counter() - start, a_pair
        start = open_start(config, model)
        model.transformer, self.attention = load_network(config, process, model, start)
        self.run = start_run(config, process, model, store, start)

    def step(self, number: int) -> tuple[float, dict[str, float]]:
        """The loss, and seconds by part."""
        step = self.run.step(number)
        return step.metrics["loss"], step.seconds


class Plain:
    """What one writes around diffusers without us."""

    networks = 4
    cache_seconds = None

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
        self.clock = Clock(process.device)
        on_gpu = process.device.type == "cuda"
        self.autocast = (lambda: torch.autocast("cuda", torch.bfloat16)) if on_gpu else nullcontext

    def step(self, number: int) -> tuple[float, dict[str, float]]:
        replaced, torch.nn.functional.linear = torch.nn.functional.linear, LINEAR
        try:
            return self._step(number)
        finally:
            torch.nn.functional.linear = replaced

    def _step(self, number: int) -> tuple[float, dict[str, float]]:
        self.clock.at("data")
        batch = load_rows(self.store, [number % PAIRS], self.process.device)
        points = start_law(self.config, self.model).draw(batch.ids, torch.zeros(len(batch), dtype=torch.int64))
        coefficients = points.coefficients.to(self.process.device, torch.float32)
        a, s, c, d = (coefficients[:, i].view(-1, *[1] * (batch.winner.ndim - 1)) for i in range(4))
        noise = torch.randn_like(batch.winner)
        states = torch.cat([a * batch.winner + s * noise, a * batch.loser + s * noise])
        targets = c * noise + d * batch.winner, c * noise + d * batch.loser
        text = self.model.pad_text(batch.text).to(self.process.device).repeat(2, 1, 1)
        inputs = states, points.timesteps.to(self.process.device, torch.float32).repeat(2), text
        with self.autocast():
            self.clock.at("reference")
            with torch.no_grad():
                reference = self.predict(self.reference, *inputs)
            self.clock.at("policy")
            pred = self.predict(self.policy, *inputs)
        loss = self.loss(pred.float(), reference.float(), targets, batch)
        loss.backward()
        self.clock.at("optimizer")
        torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.config.train.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        seconds = self.clock.stop()
        return loss.item(), seconds

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


def held_bytes() -> int:
    """Of all tensors: weights, masters, moments, gradients."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    gc.collect()
    tensors = [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor) and not (x.is_meta or is_fake(x))]
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


def measure(name: str, rungs: list[str], preset: str, rounds: int, folder: Path, process) -> Iterator[list[dict]]:
    """A row for each rung after every timed round: what is stopped has measured what it has."""
    path = f"model.path={random_folder(name, folder, process.device)}" if name in REAL else "model.path=tiny"
    file = ROOT / "configs" / (TINY.get(name) or f"{name}-localdpo.yaml")
    config = load_config(file, [path, f"output.dir={folder / name}-run", f"pairs.folder={folder / name}-pairs",
                                "train.global_batch_size=1", "train.micro_batch_size=1", f"train.steps={rounds + 2}",
                                f"deepspeed.preset={preset}",
                                "train.checkpointing=full", *(BUCKET if name in TINY else ())])  # fmt: skip
    model = load_model(config.model, with_transformer=False, with_encoders=False)
    local = model.local_folder()
    network_config = json.loads((local / "transformer/config.json").read_text())
    store = write_pairs(config, model, network_config, pairs_folder(config, "train"))
    tokens = store[0].winner.numel() // network_config["in_channels"] // 4
    built, resident, flops = {}, {}, None
    for rung in rungs:
        before = held_bytes()
        start = config, process, copy.copy(model), store
        built[rung] = Plain(*start) if rung == "plain" else Alignkit(*start, rung)
        built[rung].step(0)  # after which the moments are there
        resident[rung] = held_bytes() - before
        if rung == "plain":
            flops = forward_flops(model, built[rung].reference, config, store, process)
    clocks: dict[str, list[dict[str, float]]] = {rung: [] for rung in rungs}
    peaks = dict.fromkeys(rungs, 0.0)
    for number in range(1, rounds + 2):  # the first is warm-up
        for rung in (*rungs[number % len(rungs) :], *rungs[: number % len(rungs)]):  # none always after the same one
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            loss, seconds = built[rung].step(number)
            assert loss == loss, f"{name}, {rung}: the loss is not a number"
            if torch.cuda.is_available():
                others = sum(size for other, size in resident.items() if other != rung)
                peaks[rung] = max(peaks[rung], torch.cuda.max_memory_allocated() - others)
            print(f"{name} {rung}: step {number - 1} of {rounds}, {sum(seconds.values()):.3g} s", file=sys.stderr)
            if number > 1:
                clocks[rung].append(seconds)
        if number > 1:
            yield rows_of(name, preset, built, clocks, peaks, resident, flops, tokens)


def rows_of(name, preset, built, clocks, peaks, resident, flops, tokens) -> list[dict]:
    top = next((peak for key, peak in PEAK_FLOPS.items() if key in machine()["device"]), None)
    totals = {rung: [sum(seconds.values()) for seconds in clocks[rung]] for rung in built}

    def beside(rung: str, other: str) -> str:
        """How many times as fast as `other`, median over rounds: what else the machine does comes and goes."""
        if other not in built or rung == other:
            return ""
        return f"{statistics.median(b / a for a, b in zip(totals[rung], totals[other], strict=True)):.3g}"

    rows = []
    for rung, method in built.items():
        parts = {part: statistics.median(seconds.get(part, 0.0) for seconds in clocks[rung]) for part in PARTS}
        step = statistics.median(totals[rung])
        built_in, a_pair = method.cache_seconds or ("", "")
        rows.append({
            "model": name, "rung": rung, "preset": preset * (rung != "plain"), "attention": method.attention,
            "tokens": tokens, "steps": len(totals[rung]), "step_s": f"{step:.4g}",
            "fastest_s": f"{min(totals[rung]):.4g}", "slowest_s": f"{max(totals[rung]):.4g}",
            **{f"{part}_s": f"{seconds:.4g}" for part, seconds in parts.items()},
            "pairs_per_s": f"{1 / step:.4g}",
            "to_plain": beside(rung, "plain"), "to_alignkit": beside(rung, "alignkit"),
            "mfu": f"{method.networks * flops / step / top:.3f}" if top and flops else "",
            "peak_gb": f"{peaks[rung] / 1e9:.4g}" if torch.cuda.is_available() else "",
            "held_gb": f"{resident[rung] / 1e9:.4g}",
            "cache_s": built_in and f"{built_in:.4g}", "cache_s_per_pair": a_pair and f"{a_pair:.4g}",
        })  # fmt: skip
    return rows


def write_rows(path: Path, rows: list[dict]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*machine(), *rows[0]])
        writer.writeheader()
        writer.writerows(machine() | row for row in rows)


def draw(rows: list[dict], picture: Path) -> None:
    """Seconds a step by part, a bar for each rung, a panel for each model."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    models = list(dict.fromkeys(row["model"] for row in rows))
    figure, axes = plt.subplots(1, len(models), figsize=(1 + 5 * len(models), 3.2), squeeze=False, layout="constrained")
    for axis, model in zip(axes[0], models, strict=True):
        own = [row for row in rows if row["model"] == model]
        names = [row["rung"] for row in own]
        left = [0.0] * len(own)
        for part in PARTS:
            seconds = [float(row[f"{part}_s"]) for row in own]
            axis.barh(names, seconds, left=left, label=part)
            left = [a + b for a, b in zip(left, seconds, strict=True)]
        for row, end in zip(own, left, strict=True):
            memory = f"{row['peak_gb']} GB at most" if row["peak_gb"] else f"{1e3 * float(row['held_gb']):.0f} MB held"
            note = f"{row['to_plain']}×, {memory}" if row["to_plain"] else memory
            axis.annotate(note, (end, row["rung"]), (4, 0), textcoords="offset points", va="center", fontsize=7)
        axis.invert_yaxis()
        axis.margins(x=0.45)
        axis.set_title(f"{model}, {own[0]['tokens']} tokens a video", fontsize=9, loc="left")
        axis.set_xlabel("s a step: median of each part", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(axis="x", alpha=0.3)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=len(PARTS), fontsize=8)
    last = machine() | rows[-1]
    title = f"{last['device']} · {last['path']} · torch {last['torch']}, {last['preset']} · {last['commit']}"
    figure.suptitle(f"{title}\n×: times as fast as plain", fontsize=9)
    figure.savefig(picture, dpi=110)
    plt.close(figure)


def positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError("at least 1")
    return int(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = [name for name, file in TINY.items() if (ROOT / "configs" / file).exists()]
    parser.add_argument("--models", nargs="+", default=known, choices=[*known, *REAL], metavar="MODEL")
    parser.add_argument("--rungs", nargs="+", default=list(RUNGS), choices=RUNGS, metavar="RUNG")
    parser.add_argument("--preset", default="zero2", choices=("zero2", "zero3"), help="alignkit's, of DeepSpeed")
    parser.add_argument("--rounds", type=positive, default=7, help="timed steps of each rung, after two to warm up")
    parser.add_argument("--csv", type=Path, default=ROOT / "out" / "benchmarks" / "steps.csv")
    given = parser.parse_args()
    process = start_process()
    given.csv.parent.mkdir(parents=True, exist_ok=True)
    done: list[dict] = []
    for name in given.models:
        rows: list[dict] = []
        with tempfile.TemporaryDirectory() as folder:
            for rows in measure(name, given.rungs, given.preset, given.rounds, Path(folder), process):
                write_rows(given.csv, done + rows)
        done += rows
        for row in rows:
            parts = "  ".join(f"{part} {float(row[f'{part}_s']) / float(row['step_s']):4.0%}" for part in PARTS)
            print(f"{name:15} {row['rung']:12} {row['step_s']:>8} s a step  {parts}  {row['held_gb']} GB held"
                  + (f"  {row['to_plain']}x plain" if row["to_plain"] else "")
                  + (f"  errors computed in {row['cache_s']} s, {row['cache_s_per_pair']} s a pair"
                     if row["cache_s"] else ""), flush=True)  # fmt: skip
    picture = given.csv.with_suffix(".png")
    draw(done, picture)
    print(f"rows: {given.csv}, a picture of them: {picture}")


if __name__ == "__main__":
    main()
