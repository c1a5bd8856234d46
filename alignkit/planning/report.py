"""A plan in words, and in one line for the head of a configuration."""

from collections.abc import Iterator

from alignkit.config import changed
from alignkit.planning import work
from alignkit.planning.constants import EFFICIENCY, FILLED, GPUS_A_NODE
from alignkit.planning.memory import pairs_memory
from alignkit.planning.memory import said as _size
from alignkit.planning.plan import Plan, Stage, gpus_that_fit

PAIRS = 1000  # the figures of building pairs are for so many


def report(whole: Plan) -> str:
    return "\n".join(_lines(whole))


def _lines(whole: Plan) -> Iterator[str]:
    gpu, stage = whole.gpu, whole.largest
    count, config = stage.count, whole.config
    kind = f"{gpu.memory / 1e9:.0f} GB, {gpu.peak / 1e12:.0f} TFLOPS bf16"
    yield f"{config.model.path} on {whole.gpus} × {gpu.name} ({kind}): calculated, nothing was loaded"
    trained = "all trained" if count.trained == count.all else f"{count.trained:,} trained"
    expert = f", of the {config.model.expert} of two experts" if config.model.expert else ""
    yield _row("parameters", f"{count.all:,}, {trained}{expert}")
    for each in whole.stages:
        if each.choice:
            yield _row("deepspeed.preset", f"{f'{each.name}: ' if len(whole.stages) > 1 else ''}{each.choice}")
    yield from _memory(whole, stage)
    yield from _host(stage)
    yield from _disk(whole, stage)
    yield from _work(whole)
    if not config.data.pairs:
        yield from _pairs(whole)


def _memory(whole: Plan, stage: Stage) -> Iterator[str]:
    room = FILLED * whole.gpu.memory
    verdict = "fits" if whole.fits else "DOES NOT FIT"
    where = f" (stage {stage.name}, which takes most)" if len(whole.stages) > 1 else ""
    text = f"{_size(stage.memory.total)} of {_size(room)} ({FILLED:.0%} of {whole.gpu.name}): {verdict}{where}"
    yield _row("memory a GPU", text)
    for part, size in stage.memory.gpu.items():
        shared = f", shared by {stage.run.context} GPUs" if stage.run.context > 1 else ""
        how = f" (of {stage.run.kept_videos} at once, checkpointing {stage.run.checkpointing}{shared})"
        yield _row(f"  {part}", _size(size) + (how if part == "activations" else ""))
    if not whole.fits:
        yield from _advice(whole)


def _advice(whole: Plan) -> Iterator[str]:
    enough = bool(whole.switches) and whole.switches[-1][1] <= FILLED * whole.gpu.memory
    for number, (word, size) in enumerate(whole.switches, 1):
        yield _row(f"  → {number}.", f"{word}: {_size(size)}")
    more = gpus_that_fit(whole)
    if more:
        yield _row("  → or", f"{more} of these GPUs: fits as it is")
    if not enough and not more:
        yield _row("  →", "then fewer data.num_frames, a smaller data.height and data.width, or a GPU with more memory")


def _host(stage: Stage) -> Iterator[str]:
    parts = ", ".join(f"{part} {_size(size)}" for part, size in stage.memory.host.items())
    machines = f"{min(stage.run.gpus, GPUS_A_NODE)} processes a machine"
    yield _row("memory, machine", f"{_size(sum(stage.memory.host.values()))} on the first, {machines}: {parts}")


def _disk(whole: Plan, stage: Stage) -> Iterator[str]:
    train = stage.config.train
    one = work.checkpoint_bytes(stage.config, stage.run, stage.count)
    kept = (train.keep_checkpoints + 1) * len(whole.stages)
    text = f"{_size(one)} each, {kept} at once at most ({_size(kept * one)})"
    if len(whole.stages) > 1:
        text += f"; {_size(4 * stage.count.trained)} handed on by each stage"
    yield _row("disk: checkpoints", text)
    yield _row("disk: export", _size(work.export_bytes(whole.outline, stage.config, stage.count)))
    each = work.pair_bytes(whole.outline, whole.config)
    yield _row("disk: pairs", f"{_size(each)} each at most, {_size(PAIRS * each)} for {PAIRS}")


def _work(whole: Plan) -> Iterator[str]:
    for stage in whole.stages:
        train, step = stage.config.train, stage.step
        parts = ", ".join(f"{part} {_flops(size)}" for part, size in step.flops.items())
        moving = f", of which {_time(step.moving)} at least for offloading" if step.moving else ""
        yield _row(stage.name, f"{_flops(sum(step.flops.values()))} a step of {train.global_batch_size} pairs: {parts}")
        yield _row("", f"{_time(step.time)} a step{moving}, {_time(step.time / train.global_batch_size)} a pair")
        hours = whole.gpus * stage.seconds / 3600
        yield _row("", f"{_time(stage.seconds)} for {train.steps} steps: {hours:,.0f} GPU-hours")
        if stage.run.reference == "cached":
            cached = work.seconds(work.cache_flops(stage.config, whole.forward), whole.gpu, stage.run) / 3600
            yield _row("", f"{cached:.3g} GPU-hours before that, for alignkit cache-reference")
        if stage.rollouts:
            videos, flops = stage.rollouts
            yield _row("", f"{work.seconds(flops, whole.gpu, stage.run) / 3600:.3g} GPU-hours for {videos} rollouts")
    yield _row("", f"at {EFFICIENCY:.0%} of the peak; communication, loading and saving not counted")


def _pairs(whole: Plan) -> Iterator[str]:
    config, stage = whole.config, whole.stages[0]
    flops = work.pair_flops(config, whole.forward)
    each = work.seconds(flops, whole.gpu, stage.run)
    hours = PAIRS * each / 3600
    yield _row("building pairs", f"{_flops(flops)} and {_time(each)} of a GPU each, {hours:.3g} GPU-hours for {PAIRS}")
    yield _row("", "the time of VAE and text encoder not counted")
    parts, room = pairs_memory(whole.outline, config, stage.count, stage.run), FILLED * whole.gpu.memory
    total = sum(parts.values())
    verdict = "fits" if total <= room else "DOES NOT FIT"
    said = "; ".join(f"{part} {_size(size)}" for part, size in parts.items())
    yield _row("  memory a GPU", f"{_size(total)} of {_size(room)}: {verdict}: {said}")
    if total > room and not config.model.vae_tiling:
        tiled = changed(config, {"model": {"vae_tiling": True}}, "model.vae_tiling")
        less = sum(pairs_memory(whole.outline, tiled, stage.count, stage.run).values())
        if less < total:
            yield _row("  → 1.", f"model.vae_tiling=true: {_size(less)}")


def head(whole: Plan) -> str:
    """What a configuration says of itself in its first lines."""
    stage = whole.largest
    hours = whole.gpus * sum(each.seconds for each in whole.stages) / 3600
    verdict = "fits" if whole.fits else "does not fit"
    parts = stage.memory.gpu
    return (
        f"{whole.gpus} x {whole.gpu.name}: {_size(stage.memory.total)} a GPU ({verdict}; activations "
        f"{_size(parts['activations'])}), {_time(stage.step.time)} a step, {hours:,.0f} GPU-hours of training"
    )


def _row(name: str, text: str) -> str:
    return f"{name:30}{text}"


def _flops(count: float) -> str:
    for unit, size in (("EFLOP", 1e18), ("PFLOP", 1e15), ("TFLOP", 1e12)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count / 1e9:.3g} GFLOP"


def _time(seconds: float) -> str:
    if seconds < 0.1:
        return f"{1000 * seconds:.2g} ms"
    for unit, size in (("days", 172_800), ("h", 7200), ("min", 180)):
        if seconds >= size:
            return f"{seconds / {'days': 86_400, 'h': 3600, 'min': 60}[unit]:.3g} {unit}"
    return f"{seconds:.3g} s"
