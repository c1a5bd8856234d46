"""What each `alignkit` command does, timed: each reads what the one before left in `output.dir`."""

import re
import resource
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from alignkit.apo.pairs import broken_anchors, build_rollout_pairs, check_rollouts, read_rankings
from alignkit.apo.prompts import read_prompts
from alignkit.apo.rollouts import build_rollouts, rollouts_folder
from alignkit.config import Config, dump_config
from alignkit.errors import ConfigError, DataError
from alignkit.evaluation.readiness import CLIPS, cannot_draw, explained_share, too_few
from alignkit.files import no_room, read_json_file, write_atomically, write_json
from alignkit.given.build import build_given_pairs, find_given
from alignkit.launch import SHARING, first_of_several
from alignkit.localdpo.build import build_pairs, check_settings
from alignkit.localdpo.sources import Source, check_count, check_masks, find_usable
from alignkit.media.captions import NOTE, Problem
from alignkit.media.videos import PLAYBACK_FPS, decode_clip, write_video
from alignkit.models import VideoModel, load_model
from alignkit.objectives.states.checks import check_noise, check_states
from alignkit.progress import progress, say
from alignkit.report.pictures import StoredPair, write_pair, write_preview
from alignkit.sharing import run_lock
from alignkit.stages import SUPPLIED, stage_configs
from alignkit.stores.folders import pairs_folder, video_spec
from alignkit.stores.pairs import Pair, PairStore
from alignkit.stores.rollouts import RolloutStore
from alignkit.training.cache import build_cache, with_cache
from alignkit.training.context import PAIRS_KEY, ROLLOUT_KEY, make_by_first, token_worker
from alignkit.training.distributed import Process, group_lock, lone_worker, set_threads, start_process
from alignkit.training.loop import check_training
from alignkit.training.references import check_reference
from alignkit.training.supply import Waiting

PAIRS_IN_REPORT = 6
GROUPED = ("pairs", "rollout")  # sections by the names of the commands whose processes may share each video's tokens
TOGETHER = ("train", "cache-reference")  # of one process group, which learns together whether it has the lock


def run_command(name: str, config: Config) -> None:
    """Run one of COMMANDS and record how long it took and how much memory the process has used at most.

    Raises ConfigError while another command writes to the same output.dir, DataError where its disk is full.
    """
    try:
        if name in TOGETHER:
            _timed(name, config)
        elif name in GROUPED and getattr(config, name).context_parallel > 1:
            with group_lock(start_process(), config.output.dir, name, shared=True):
                _timed(name, config)
        elif first_of_several():  # each task of an array, too
            with run_lock(config.output.dir, name, shared=name in SHARING):
                _timed(name, config)
        else:
            COMMANDS[name](config)
    except Exception as error:
        elsewhere = config.pairs.folder, config.rollout.folder, config.reference.cache
        full = no_room(error, config.output.dir, *filter(None, elsewhere))
        if full is None:
            raise
        raise DataError(full) from error


def _timed(name: str, config: Config) -> None:
    file = config.output.dir / "stages.json"
    _times(file)
    start = time.perf_counter()
    COMMANDS[name](config)
    seconds = time.perf_counter() - start
    if not lone_worker().main:
        return
    stages = _times(file)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    write_json(file, stages | {name: {"seconds": round(seconds, 2), "peak_memory_gb": round(peak, 3)}})
    say(f"{name} took {seconds:.0f} s")


def validate(config: Config) -> None:
    """Say what cannot be used of the data; nothing is made. Raises DataError when there is anything."""
    problems: list[Problem] = []
    if config.data.prompts:
        say(f"{len(read_prompts(config.data.prompts))} prompts")
        check_noise(config, load_model(config.model, with_transformer=False, with_encoders=False))
    if config.data.rollouts and config.data.pairs:
        rankings, problems = read_rankings(config.data.pairs, check_rollouts(config)[1])
        problems += broken_anchors(config, rankings)
    elif config.data.pairs:
        _, problems = find_given(config)
    elif config.data.videos or not (config.data.prompts or config.stages):
        check_settings(config)
        sources, problems = find_usable(config)
        problems += check_masks(config, sources)
    for problem in problems:
        say(f"{problem.video}: {problem.reason}")
    if config.data.videos:
        check_count(config, sources, problems)
    bad = [problem for problem in problems if problem.kind != NOTE]
    if bad:
        raise DataError(f"{len(bad)} {'thing' if len(bad) == 1 else 'things'} cannot be used, see above")
    if config.stages:
        from alignkit.stages.chain import check_supplies

        check_supplies(stage_configs(config))
    say("everything can be used")


def check_train(config: Config, processes: int, *, made: bool = True) -> None:
    """What can be wrong with a training run before any process is started. made: whether its pairs are there by now."""
    from alignkit.stages.chain import check_chain, check_stages

    process = Process(0, processes, 0, _device())
    if config.stages:
        (check_chain if made else check_stages)(stage_configs(config), process)
        return
    check_training(config, process)
    if made:
        check_states(config, PairStore(pairs_folder(config, "train")))
    check_reference(config)


def check_cache_reference(config: Config) -> None:
    """The same of what the reference's errors are computed for."""
    PairStore(pairs_folder(_run_to_cache(config), "train"))


def _run_to_cache(config: Config) -> Config:
    """The run whose reference can be cached: of a chain its first stage, since the others start from other weights."""
    if config.stages:
        name, stage = stage_configs(config)[0]
        if name in SUPPLIED:
            raise ConfigError(
                f"cache-reference: stage {name} makes its pairs while it trains; use reference.strategy: copy"
            )
        return with_cache(stage, f"cache-reference: stage {name}")
    return with_cache(config, "cache-reference")


def _pairs(config: Config) -> None:
    """One of any number of processes that build the pairs between them; the first one speaks for all."""
    worker, group = token_worker(config, PAIRS_KEY, config.pairs.context_parallel)
    build = build_given_pairs if config.data.pairs else build_pairs
    build = build_rollout_pairs if config.data.rollouts else build
    hooks = {"preview": partial(_preview_pairs, config)} if worker.main else {}
    if worker.main and build is build_pairs:
        hooks["foresee"] = partial(_foresee, config)
    made = partial(build, config, worker.device, show=worker.main, group=group, **hooks)
    for split in make_by_first(config, worker.device, group, made) or ():
        if worker.main:
            folder, count = pairs_folder(config, split), len(PairStore(pairs_folder(config, split)))
            size = sum(file.stat().st_size for file in folder.glob("block-*.arrow")) / 1e6
            say(f"{count} {split} pairs, {size:.3g} MB, in {folder}")
    if worker.main:
        write_atomically(config.output.dir / "config.yaml", dump_config(config).encode())


def _foresee(config: Config, model: VideoModel, sources: list[Source], heldout: int) -> None:
    """Say now that there will be no verdict, when that is so already."""
    first = sources[:CLIPS]
    clips = torch.stack([decode_clip(source.clip.path, video_spec(config)) for source in first])
    latents = torch.cat([model.encode_video(clip[None]) for clip in clips])
    text = model.pad_text(model.encode_text([source.clip.caption for source in first])).to(latents.device, model.dtype)
    share = explained_share(model, latents, text)
    for reason in (cannot_draw(share, config.model.path), too_few(heldout)):
        if reason:
            say(f"this alignment cannot be judged: {reason}")


def _rollout(config: Config) -> None:
    """One of any number of processes that sample the rollouts between them; the first one speaks for all."""
    worker, group = token_worker(config, ROLLOUT_KEY, config.rollout.context_parallel)
    preview = partial(_preview_rollouts, config) if worker.main else None
    made = partial(build_rollouts, config, worker.device, show=worker.main, preview=preview, group=group)
    count = make_by_first(config, worker.device, group, made)
    if worker.main:
        folder, sampler = rollouts_folder(config), config.sampler
        size = sum(file.stat().st_size for file in folder.glob("block-*.arrow")) / 1e6
        guided = f"guided by {sampler.guidance:g}" if sampler.guidance > 1 else "without guidance"
        say(f"{count} rollouts, {guided}, {size:.3g} MB, in {folder}")
        write_atomically(config.output.dir / "config.yaml", dump_config(config).encode())


def _rank(config: Config) -> None:
    from alignkit.rankers.rollouts import rank_rollouts

    set_threads(1)
    try:
        ranked = rank_rollouts(config, _device())
    except Waiting as reason:
        say(f"{reason}; the same command continues")
        raise SystemExit(0) from None
    rollouts = config.data.rollouts or rollouts_folder(config)
    say(f"{ranked.pairs} pairs from {ranked.prompts} prompts, {ranked.ties} dropped as ties, in {ranked.file}")
    say(f"make pairs of them with: alignkit pairs … data.rollouts={rollouts} data.pairs={ranked.file}")


def _preview_rollouts(config: Config, model: VideoModel, store: RolloutStore) -> None:
    """Some rollouts as videos for people to check: previews/ID-PROMPT.mp4 beside them."""
    folder = store.folder / "previews"
    folder.mkdir(exist_ok=True)
    rollouts = [store[i] for i in range(min(config.rollout.previews, len(store)))]
    files = {folder / f"{rollout.id:06d}-{_in_a_name(rollout.prompt)}.mp4": rollout for rollout in rollouts}
    missing = {file: rollout for file, rollout in files.items() if not file.exists()}
    for file, rollout in missing.items():
        video = model.decode_video(rollout.latents[None].to(model.vae.device))[0]
        write_video(file, video, config.data.fps or PLAYBACK_FPS)
    if missing:
        say(f"previews, named after their prompts: {folder}")


def _in_a_name(prompt: str) -> str:
    return re.sub(r"\W+", "-", prompt)[:40].strip("-")


def _preview_pairs(config: Config, model: VideoModel, store: PairStore) -> None:
    """Some pairs of a store as pictures for people to check: pairs/SPLIT/previews/ID.png."""
    folder = store.folder / "previews"
    folder.mkdir(exist_ok=True)
    pairs = [store[i] for i in range(min(config.pairs.previews, len(store)))]
    files = {folder / f"{pair.id:06d}.png": pair for pair in pairs}
    missing = {file: pair for file, pair in files.items() if not file.exists()}
    for file, pair in missing.items():
        write_preview(file, _decoded(model, pair))
    if missing:
        say(f"previews, winner above region above loser: {folder}")


def _decoded(model: VideoModel, pair: Pair) -> StoredPair:
    # one after the other: two videos of full size may not fit beside the network
    winner, loser = (
        model.decode_video(side[None].to(model.vae.device))[0].numpy() for side in (pair.winner, pair.loser)
    )
    return StoredPair(winner, loser, model.frames_of_mask(pair.mask).numpy(), pair.prompt, pair.strength)


def _cache_reference(config: Config) -> None:
    from alignkit.planning.preset import check_offload, resolved

    process = start_process()
    with group_lock(process, config.output.dir, "cache-reference"):
        run = resolved(_run_to_cache(config), process)
        check_offload(run, process)
        config.output.dir.mkdir(parents=True, exist_ok=True)
        build_cache(run, process)
    if config.reference.strategy != "cached" and process.main:
        say("train with reference.strategy=cached to use them")


def _train(config: Config) -> None:
    from alignkit.planning.preset import check_offload, resolved
    from alignkit.planning.rate import seconds_at_peak
    from alignkit.stages.chain import run_chain
    from alignkit.training.loop import train

    process = start_process()
    with group_lock(process, config.output.dir, "train"):
        config = resolved(config, process)
        check_offload(config, process)
        run = run_chain if config.stages else train
        done = run(config, process, at_peak=seconds_at_peak)
    if not done:
        raise SystemExit(0)


def _sample(config: Config) -> None:
    """One of any number of processes that sample the videos between them; the first one speaks for all."""
    from alignkit.evaluation.samples import sample

    worker = lone_worker()
    sample(config, worker.device, show=worker.main)


def _eval(config: Config) -> None:
    """One of any number of processes that measure between them; the first one concludes."""
    from alignkit.evaluation.summary import evaluate, summary_file

    worker = lone_worker()
    summary = evaluate(config, worker.device, conclude=worker.main)
    if summary is not None:
        write_json(summary_file(config), summary | _costs(config))


def _report(config: Config) -> None:
    from alignkit.evaluation.summary import summary_file
    from alignkit.report import write_report
    from alignkit.report.run import read_run

    summary = read_run(config.output.dir).summary | _costs(config)
    store = PairStore(pairs_folder(config, "heldout"))
    shown = [store[i] for i in range(min(PAIRS_IN_REPORT, len(store)))]
    model = load_model(config.model, with_transformer=False, device=_device())  # the last that may be refused
    write_json(summary_file(config), summary)
    _decode_pairs(config.output.dir / "report_pairs", model, shown)
    say(f"report: {write_report(config.output.dir)}")


def _decode_pairs(folder: Path, model: VideoModel, pairs: list[Pair]) -> None:
    """Some held-out pairs as pictures: winner, loser and mask in NNN.npz."""
    folder.mkdir(exist_ok=True)
    with progress("decoding held-out pairs", len(pairs)) as bar:
        for i, pair in enumerate(pairs):
            write_pair(folder / f"{i:03d}.npz", _decoded(model, pair))
            bar.advance()


def _times(file: Path) -> dict[str, Any]:
    """By stage; none where there is no file yet. Raises DataError for a damaged one."""
    return read_json_file(file, "delete it: how long each stage took is all that it tells") if file.exists() else {}


def _costs(config: Config) -> dict[str, Any]:
    stages = _times(config.output.dir / "stages.json")
    return {
        "seconds": {name: stage["seconds"] for name, stage in stages.items()},
        "peak_memory_gb": max((stage["peak_memory_gb"] for stage in stages.values()), default=None),
    }


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


COMMANDS = {
    "rollout": _rollout,
    "rank": _rank,
    "pairs": _pairs,
    "cache-reference": _cache_reference,
    "train": _train,
    "sample": _sample,
    "eval": _eval,
    "report": _report,
}
