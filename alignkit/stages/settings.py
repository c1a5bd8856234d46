"""What each stage of a chain changes of the configuration around it, by section; its own entry goes on top.

Read before anything heavy is imported, so that a chain that does not fit is refused at once.
"""

from typing import Any

from alignkit.config import OBJECTIVES, Config


def localdpo(config: Config) -> dict[str, dict[str, Any]]:
    """Preferences between real videos and their own regenerated regions (arXiv 2601.04068): the objective around it, or
    `local_dpo` where that one compares nothing."""
    return {"objective": {"name": "local_dpo"}} if config.objective.name == "sft" else {}


def sft(config: Config) -> dict[str, dict[str, Any]]:
    """Supervised fine-tuning on the winners of the pairs."""
    return {} if config.objective.name == "sft" else {"objective": {"name": "sft"}}


def offline(config: Config) -> dict[str, dict[str, Any]]:
    """Preferences between pairs that are ranked already, a store or videos that `data` of its entry names: the
    objective around it, or `dpo` where that one compares nothing."""
    return {"objective": {"name": "dpo"}} if config.objective.name == "sft" else {}


def online(config: Config) -> dict[str, dict[str, Any]]:
    """`dpo`, where the objective around it compares regions or nothing."""
    return _trained_with(config, "dpo") if config.objective.name in ("sft", "local_dpo") else {}


def half_online(config: Config) -> dict[str, dict[str, Any]]:
    """The head that guards the winner, instead of one without a bound on what the winner may lose."""
    return _trained_with(config, "winner_guarded") if config.objective.name in ("sft", "local_dpo", "dpo") else {}


def distill(config: Config) -> dict[str, dict[str, Any]]:
    """Supervised, on states of the teacher's paths at the student's own steps."""
    return _on_students_path(config) | ({} if config.objective.name == "sft" else {"objective": {"name": "sft"}})


def drift_correction(config: Config) -> dict[str, dict[str, Any]]:
    """`dpo`, where the objective around it compares regions or nothing, at the states that both samplers visited."""
    compares = config.objective.name not in ("sft", "local_dpo")
    return _on_students_path(config) | ({} if compares else _trained_with(config, "dpo"))


def _on_students_path(config: Config) -> dict[str, dict[str, Any]]:
    """The student's own sampler, and training at its steps."""
    steps = config.student.num_inference_steps
    wanted: dict[str, dict[str, Any]] = {
        "rollout": {
            "solver": "first_order", "num_inference_steps": steps, "guidance_scale": 1.0, "dynamic_guidance": False,
        },
        "noise": {
            "source": "path", "timesteps": "schedule", "path_steps": steps, "interval": None, "path_between": False,
            "guided": False,
        },
        "train": {"caption_dropout": 0.0},
    }  # fmt: skip
    changes = {
        section: {key: value for key, value in keys.items() if getattr(getattr(config, section), key) != value}
        for section, keys in wanted.items()
    }
    return {section: keys for section, keys in changes.items() if keys}


def _trained_with(config: Config, name: str) -> dict[str, dict[str, Any]]:
    """The change to the objective `name`, which keeps what was set of the keys that both read; what was left at its
    default takes the new one's."""
    section = config.objective
    usual = OBJECTIVES[section.name]
    kept = {
        key: getattr(section, key) for key in OBJECTIVES[name] if key in usual and getattr(section, key) != usual[key]
    }
    return {"objective": {"name": name} | kept}


STAGES = {
    "localdpo": localdpo,
    "sft": sft,
    "offline": offline,
    "online": online,
    "half_online": half_online,
    "distill": distill,
    "drift_correction": drift_correction,
}
