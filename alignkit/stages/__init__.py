"""Stages of a chain, `stages: [...]`: training runs one after the other, each from the fp32 weights of the one before.

What a stage is called and changes is in `settings`; what makes pairs while it trains has a file of its own.
"""

from alignkit.config import OBJECTIVES, Config, changed, merged
from alignkit.errors import ConfigError
from alignkit.stages.settings import STAGES

STUDENTS = ("distill", "drift_correction")
"""Those that train a few-step student."""
SUPPLIED = ("online", "half_online", *STUDENTS)
"""Those that make their pairs while they train."""


def stage_configs(config: Config) -> list[tuple[str, Config]]:
    """Name and configuration of every stage, each with a folder of its own: output.dir/stages/01-NAME, and so on.

    A stage trains on the pairs of the chain, unless its entry changes `data` or `pairs`: then on its own, in its
    folder, or on those of the `pairs.folder` that it names. Raises ConfigError for an entry that does not fit, before
    anything is loaded.
    """
    stages: list[tuple[str, Config]] = []
    for number, entry in enumerate(config.stages or (), 1):
        where = f"stages: entry {number} ({entry.name})"
        folder = config.output.dir / "stages" / f"{number:02d}-{entry.name}"
        shared = config.pairs.folder or config.output.dir / "pairs"
        own = folder / "pairs" if entry.data or entry.pairs or entry.name in SUPPLIED else shared
        places = {
            "output": {"dir": str(folder)},
            "pairs": {"folder": entry.pairs.get("folder") or str(own)},
        }
        if entry.student and entry.name not in STUDENTS:
            raise ConfigError(f"{where}: student: is read by {' and '.join(STUDENTS)} alone; leave it out")
        earlier = [name for name, _ in stages if name in STUDENTS]
        if earlier and entry.name not in STUDENTS:
            raise ConfigError(
                f"{where}: a student, which {earlier[0]} makes, is trained further by drift_correction alone"
            )
        around = config.model_copy(update={"student": config.student.model_copy(update=entry.student)})
        changes = merged(STAGES[entry.name](around), entry.model_dump(exclude={"name"}))
        stage = changed(config.model_copy(update={"stages": None}), merged(changes, places), where)
        for section, keys in STAGES[entry.name](stage).items():
            for key, value in keys.items():
                raise ConfigError(f"{where}: {section}.{key}: this stage trains with {value!r}; leave it out")
        if stage.train.lora != config.train.lora:
            raise ConfigError(f"{where}: train.lora: hands on adapters or all weights, so set it once, for all stages")
        compares = "beta" in OBJECTIVES[stage.objective.name]
        if number > 1 and compares and stage.reference.strategy == "adapter":
            raise ConfigError(
                f"{where}: reference.strategy: with its adapters off the model is the base, not what this stage starts "
                "from; leave it at auto"
            )
        if entry.name in SUPPLIED and stage.reference.strategy == "cached":
            raise ConfigError(
                f"{where}: reference.strategy: a cache holds errors of pairs that are there already, and this stage "
                "makes its own; use copy"
            )
        if entry.name in SUPPLIED and stage.model.expert:
            raise ConfigError(
                f"{where}: model.expert: this stage samples through the network that it trains, and of two experts a "
                "run holds one; rank rollouts instead (alignkit rollout), or build pairs of videos"
            )
        if entry.name in SUPPLIED and stage.train.validate_every is not None:
            raise ConfigError(
                f"{where}: train.validate_every: a stage that makes its own pairs holds none out; set it to null in "
                "this entry"
            )
        if entry.name == "online" and stage.rollout.per_prompt < 2:
            raise ConfigError(f"{where}: rollout.per_prompt: 1 leaves nothing to compare; 2 or more")
        if number > 1 and compares and stage.reference.strategy == "cached":
            raise ConfigError(
                f"{where}: reference.strategy: a cache holds errors of the base, not of what this stage starts from; "
                "use copy"
            )
        stages.append((entry.name, stage))
    return stages
