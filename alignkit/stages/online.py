"""`online` and `half_online`: preferences between rollouts of the policy as it is, or between an anchor and them."""

from alignkit.apo.prompts import read_prompts
from alignkit.config import Config
from alignkit.errors import ConfigError
from alignkit.localdpo.sources import check_count, find_usable, split_clips
from alignkit.stages.rounds import Rounds


def online(config: Config) -> dict:
    """`dpo`, where the objective around it compares regions or nothing."""
    return {"objective": {"name": "dpo"}} if config.objective.name in ("sft", "local_dpo") else {}


def half_online(config: Config) -> dict:
    """The head that guards the winner, instead of one without a bound on what the winner may lose."""
    return {"objective": {"name": "winner_guarded"}} if config.objective.name in ("sft", "local_dpo", "dpo") else {}


def rounds_of(name: str, config: Config, start: str) -> Rounds:
    """The supply of the stage's pairs. Online: prompts of data.prompts, or the captions of the clips of data.videos
    that are trained on; half-online: those clips, as anchors.

    Raises ConfigError where no ranker is set, DataError for prompts or videos that cannot be used.
    """
    if config.ranker.by is None:
        raise ConfigError(f"stage {name}: ranker.by: not set; it says who compares the rollouts")
    if name == "online" and config.data.prompts:
        return Rounds(config, read_prompts(config.data.prompts), start)
    if config.data.videos is None:
        needed = "data.prompts or data.videos" if name == "online" else "data.videos, its anchors"
        raise ConfigError(f"stage {name}: {needed}: not set")
    sources, problems = find_usable(config, show=False)
    check_count(config, sources, problems)
    train, _ = split_clips(len(sources), config.data.heldout, config.pairs.seed)
    clips = {sources[n].clip.caption: sources[n].clip.path for n in reversed(train)}
    anchors = dict(reversed(clips.items()))  # of several clips with one caption the first
    return Rounds(config, list(anchors), start, anchors if name == "half_online" else None)
