"""The objective of a stage that trains with another one than the configuration around it."""

from alignkit.config import OBJECTIVES, Config


def trained_with(config: Config, name: str) -> dict:
    """The change to the objective `name`, which keeps what was set of the keys that both read; what was left at its
    default takes the new one's."""
    section = config.objective
    usual = OBJECTIVES[section.name]
    kept = {
        key: getattr(section, key) for key in OBJECTIVES[name] if key in usual and getattr(section, key) != usual[key]
    }
    return {"objective": {"name": name} | kept}
