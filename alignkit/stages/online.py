"""`online` and `half_online`: preferences between rollouts of the policy as it is, or between an anchor and them."""

import hashlib
from pathlib import Path

from alignkit.apo.prompts import read_prompts
from alignkit.config import Config
from alignkit.errors import ConfigError, DataError
from alignkit.localdpo.sources import check_count, find_usable, split_clips
from alignkit.media.videos import PLAYBACK_FPS, decode_clip, write_video
from alignkit.rankers.protocol import Comparison
from alignkit.rankers.rollouts import (
    answers_about,
    choose,
    comparisons_of,
    decode_rollouts,
    rankings_folder,
    video_file,
)
from alignkit.stages.rounds import Made, Rounds, build_rows
from alignkit.stores.folders import video_spec
from alignkit.stores.rollouts import RolloutStore
from alignkit.training.run import Run


def rounds_of(name: str, config: Config, start: str) -> Rounds:
    """The supply of the stage's pairs. Online: prompts of data.prompts, or the captions of the clips of data.videos
    that are trained on; half-online: those clips, as anchors.

    Raises ConfigError where no ranker is set, DataError for prompts or videos that cannot be used.
    """
    if config.ranker.by is None:
        raise ConfigError(f"stage {name}: ranker.by: not set; it says who compares the rollouts")
    if name == "online":
        return AmongThemselves(config, prompts_of(name, config), start)
    if config.data.videos is None:
        raise ConfigError(f"stage {name}: data.videos, its anchors: not set")
    return BesideAnchors(config, _clips(config), start)


def prompts_of(name: str, config: Config) -> list[str]:
    """The prompts of data.prompts, or the captions of the clips of data.videos that are trained on."""
    if config.data.prompts:
        return read_prompts(config.data.prompts)
    if config.data.videos is None:
        raise ConfigError(f"stage {name}: data.prompts or data.videos: not set")
    return list(_clips(config))


def _clips(config: Config) -> dict[str, Path]:
    """The clips that are trained on by caption, of several with one caption the first."""
    sources, problems = find_usable(config, show=False)
    check_count(config, sources, problems)
    train, _ = split_clips(len(sources), config.data.heldout, config.pairs.seed)
    clips = {sources[n].clip.caption: sources[n].clip.path for n in reversed(train)}
    return dict(reversed(clips.items()))


class AmongThemselves(Rounds):
    """Rollouts of one prompt beside each other."""

    def rank(self, config: Config, run: Run, rollouts: RolloutStore, number: int) -> Made:
        decode_rollouts(config, rollouts, run.process.device, show=False)
        comparisons = comparisons_of(rollouts, rankings_folder(config))
        rows, dropped = choose(config, rollouts, answers_about(config, comparisons, show=False, stop=run.stop))
        build_rows(config, run, rollouts, rows, number)
        compared = len(comparisons) if config.ranker.keep == "all" else len({c.prompt for c in comparisons})
        return Made(len(rows), dropped, compared)


class BesideAnchors(Rounds):
    """Rollouts beside a video of their prompt, `anchors`."""

    def __init__(self, config: Config, anchors: dict[str, Path], start: str):
        super().__init__(config, list(anchors), start, {prompt: _digest(file) for prompt, file in anchors.items()})
        self._anchors = anchors

    def rank(self, config: Config, run: Run, rollouts: RolloutStore, number: int) -> Made:
        """Anchors that win against a rollout.

        SoPo's rule (arXiv 2412.05095), with P(the rollout is better) as its score: at 0.5 or above it is no loser.
        """
        decode_rollouts(config, rollouts, run.process.device, show=False)
        folder = rankings_folder(config)
        found: dict[str, list[tuple[float, int]]] = {}
        # beside the rollouts, under names of their own: a scorer may look a folder's files up by name
        anchors = {prompt: folder / "videos" / f"anchor-{i:06d}.mp4" for i, prompt in enumerate(self._anchors)}
        comparisons = []
        for rollout in rollouts.ids:
            prompt = rollouts.prompt_of(rollout)
            if not anchors[prompt].exists():  # as large and long as the rollouts are
                clip = decode_clip(self._anchors[prompt], video_spec(config))
                write_video(anchors[prompt], clip, config.data.fps or PLAYBACK_FPS)
            comparisons.append(Comparison(str(rollout), prompt, video_file(folder, rollout), anchors[prompt]))
        for name, answer in answers_about(config, comparisons, show=False, stop=run.stop).items():
            if answer < 0.5:
                found.setdefault(rollouts.prompt_of(int(name)), []).append((answer, int(name)))
        rows = []
        for prompt, losers in found.items():
            kept = sorted(losers) if config.ranker.keep == "all" else [min(losers)]
            rows += [
                {"prompt": prompt, "chosen": str(self._anchors[prompt].resolve()), "rejected": loser, "p": 1 - answer}
                for answer, loser in kept
            ]
        build_rows(config, run, rollouts, rows, number)
        return Made(len(rows), len(comparisons) - sum(len(losers) for losers in found.values()), len(comparisons))


def _digest(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()[:16]
    except OSError as error:
        raise DataError(f"{file}: an anchor cannot be read ({error.strerror})") from None
