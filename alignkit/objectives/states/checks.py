"""What a noise source needs of the model, before weights load, and of the pairs."""

from typing import Any

from torch import Tensor

from alignkit.config import Config
from alignkit.errors import ConfigError, DataError
from alignkit.models import VideoModel, family_module, load_model
from alignkit.objectives.laws import Law, start_law
from alignkit.stores.origins import Origin
from alignkit.stores.pairs import FOLLOWING, INVERTED, SAMPLED, PairStore

OWN = ("initial", "path", "inversion")
"""The sources that are at each side's own states."""


def check_noise(config: Config, model: VideoModel) -> Law:
    """The timestep law of `config`, if its noise source can be had from `model`, whose weights are not read.

    Raises ConfigError for what would make nonsense: noise that the sampler does not keep, points between the states of
    a solver that walks no known line, states without noise in them, an interval without steps.
    """
    noise, sampler = config.noise, config.sampler
    law = start_law(config, model)
    if sampler.dynamic:
        family_module(model.family).dynamic_guidance(sampler.guidance, 0, sampler.num_steps)
    if noise.source == "initial" and sampler.solver == "model" and model.forgets_noise:
        raise ConfigError(
            f"noise.source: 'initial' trains on the noise that videos were sampled from, but {model.forgets_noise}; "
            "set rollout.solver: first_order (DDIM), or noise.source: path"
        )
    if noise.path_between and noise.source == "path" and sampler.solver == "model":
        reason = model.first_order(sampler.num_steps)
        if reason:
            raise ConfigError(
                "noise.path_between: the path between two states is known of a first-order solver alone, and "
                f"{reason}; set rollout.solver: first_order, or leave it out"
            )
    if noise.source in OWN:
        masses = law.masses
        possible = int((masses > 0).sum())
        empty = [row for row in range(len(masses)) if masses[row] > 0 and not law.schedule.coefficients[row, 1] > 0]
        if empty:
            raise ConfigError(
                f"noise.source: step {empty[0]} of the sampler has no noise (s = 0), so none can be solved for there; "
                "leave it out by noise.interval"
            )
        if possible < noise.path_steps and noise.source != "initial":
            raise ConfigError(
                f"noise.path_steps: {noise.path_steps}, but only {possible} of the sampler's {len(masses)} steps can "
                "be drawn; lower it, or widen noise.interval"
            )
    return law


def sampler_terms(config: Config, model: VideoModel) -> dict[str, Any]:
    """How training's videos are sampled, as an origin's recipe names it."""
    sampler = config.sampler
    return {
        "schedule": model.schedule(sampler.num_steps).fingerprint,
        "solver": sampler.solver,
        "steps": sampler.num_steps,
        "guidance": sampler.guidance,
        "dynamic": sampler.dynamic,
        "negative_prompt": sampler.negative_prompt,
        **expert_terms(config),
    }


def expert_terms(config: Config) -> dict[str, Any]:
    """The same of what a model with two experts is sampled by beside that; empty of one with one network."""
    return {"guidance_scale_2": config.model.guidance_scale_2} if config.model.expert else {}


def check_origins(config: Config, model: VideoModel, law: Law, store: PairStore) -> None:
    """Raises DataError unless every pair of `store` has what `noise.source` needs, sampled as `config` samples."""
    source = config.noise.source
    if source not in OWN:
        return
    paths = store.states_of
    wanted = sampler_terms(config, model)
    _check_inversions(config, law, store)
    starts: dict[tuple[int, int], str] = {}
    for row, sides in enumerate(zip(*store.origins, strict=True)):
        where = f"{store.folder}: pair {store.ids[row]}"
        kinds = [origin.kind for origin in sides]
        for origin, beside, states in zip(sides, kinds[::-1], paths[row], strict=True):
            _check_side(config, origin, beside, states, where)
            if origin.kind == "rollout" and source != "inversion":
                _check_recipe(origin, wanted, where)
            if source == "initial" and origin.kind == "regenerated":
                steps, then = origin.recipe["steps"], origin.recipe["schedule"]
                if (now := model.schedule(steps).fingerprint) != then:
                    raise DataError(
                        f"{where}: its loser was regenerated on the schedule {then!r}, the model's {steps} steps are "
                        f"{now!r} now; build the pairs again"
                    )
                starts.setdefault((steps, origin.first), where)
        if config.noise.guided and "rollout" not in kinds:
            raise DataError(f"{where}: noise.guided is for pairs of rollouts, whose guidance is known; leave it out")
    _check_starts(law, model, starts)
    _check_rows(config, law, store)


def check_states(config: Config, store: PairStore) -> None:
    """Both checks, of pairs that are to be trained on; no weights are read."""
    model = load_model(config.model, with_transformer=False, with_encoders=False)
    check_origins(config, model, check_noise(config, model), store)


def _check_inversions(config: Config, law: Law, store: PairStore) -> None:
    """Inversions are states of one schedule: at another's steps they would be of another noise level."""
    used = any(config.noise.inverts(*kinds) for kinds in (("real", "rollout"), ("given", "given")))
    then, now = store.info.made.get("inverted_on"), law.schedule.fingerprint
    if used and store.inverted and then != now:
        raise DataError(
            f"{store.folder}: its videos were inverted on the schedule {then!r}, the configuration trains on {now!r}; "
            "set rollout.num_inference_steps to what it was, or build the pairs again"
        )


def _check_rows(config: Config, law: Law, store: PairStore) -> None:
    """Of the steps that a pair has states at, some must lie in `noise.interval`, and none be without noise."""
    allowed = set(law.allowed.tolist())
    for number, rows, states in zip(store.ids, store.path_rows, store.states_of, strict=True):
        unread = config.noise.source == "initial" and not any(INVERTED in side for side in states)
        if unread or not any(states):
            continue
        if not allowed & set(rows):
            raise DataError(
                f"{store.folder}: pair {number} has states at steps {', '.join(map(str, rows))} alone, of which none "
                "lies in noise.interval; widen it, or sample or build them again with it"
            )
        if any(not law.schedule.coefficients[row, 1] > 0 for row in rows):
            raise DataError(f"{store.folder}: pair {number} has a state without noise (s = 0) to solve for")


def _check_side(config: Config, origin: Origin, beside: str, states: str, where: str) -> None:
    source, kind = config.noise.source, origin.kind
    inverts = config.noise.inverts(kind, beside)
    if states and config.noise.path_between and FOLLOWING not in states and (inverts or source == "path"):
        raise DataError(
            f"{where}: holds no states that follow its own, which noise.path_between needs; leave it out, or sample "
            "and build them again with it"
        )
    if inverts:
        if INVERTED not in states:
            raise DataError(
                f"{where}: holds no inversion of its {kind} video, which noise.source {source!r} needs; build the "
                "pairs with this configuration, in another folder"
                + ("" if source == "inversion" else ", or set noise.anchor: shared")
            )
    elif kind == "given":
        raise DataError(
            f"{where}: nothing is known of where its given videos come from, which noise.source {source!r} needs; use "
            "shared or inversion"
        )
    elif source == "path" and kind == "regenerated":
        raise DataError(
            f"{where}: its loser is a regenerated region, which has no path of its own from noise; noise.source 'path' "
            "is for rollouts: use initial, inversion or shared"
        )
    elif source == "path" and kind == "rollout" and SAMPLED not in states:
        raise DataError(
            f"{where}: its rollouts hold no states of their path; run alignkit rollout with noise.source=path in "
            "another folder, and make the pairs from that"
        )


def _check_recipe(origin: Origin, wanted: dict[str, Any], where: str) -> None:
    for name, now in wanted.items():
        then = origin.recipe.get(name)
        if then != now:
            raise DataError(
                f"{where}: was sampled with {name} = {then!r}, the configuration trains on {now!r}; set `rollout` to "
                "what it was, or sample again"
            )


def _check_starts(law: Law, model: VideoModel, starts: dict[tuple[int, int], str]) -> None:
    """A regenerated video has known its noise from its first row on: noisier points are none of its path."""
    for (steps, first), where in starts.items():
        start = model.schedule(steps)
        if _noisiness(law.noisiest) > _noisiness(start.coefficients[first]):
            share = start.timesteps[first].item() / model.scheduler.config.num_train_timesteps
            raise DataError(
                f"{where}: its loser was regenerated from step {first} of {steps} on, so noise.source 'initial' knows "
                f"no noisier point of its path; set noise.interval to end at {share:.3f} or below"
            )


def _noisiness(coefficients: Tensor) -> float:
    a, s = coefficients[:2].tolist()
    return s / a if a else float("inf")
