"""What `alignkit demo` runs, and which runs have clips drawn for them."""

import json
import os
from pathlib import Path

from alignkit.config.finding import shipped_config
from alignkit.config.reading import load_config
from alignkit.config.sections import Family, ModelSection
from alignkit.config.whole import Config


def demo_config(
    family: Family, videos: Path | None, out: Path | None, overrides: list[str]
) -> tuple[Config, Path | None]:
    """A shipped small model's configuration, all under `out`, and the folder that clips are to be drawn into: None
    where it is on `videos`, or on those that an override names. Raises ConfigError as `load_config`."""
    if out is None:
        marks = [family] * (family != ModelSection().family) + ["videos"] * (videos is not None)
        out = Path("runs") / "-".join(["demo", *marks])
    folder = videos or out / "clips"
    settings = [f"data.videos={json.dumps(str(folder))}", f"output.dir={json.dumps(str(out))}", *overrides]
    config = load_config(shipped_config(f"{family}-tiny-localdpo.yaml"), settings)
    drawn = videos is None and config.data.videos == Path(os.path.abspath(folder))
    return config, config.data.videos if drawn else None


def draws_clips(config: Config) -> bool:
    """Whether `alignkit run` draws clips: for a shipped small model, where neither it nor a stage names data."""
    data = config.data
    own = any(entry.data or entry.pairs.get("folder") for entry in config.stages or ())
    return config.model.path == "tiny" and not (data.videos or data.pairs or data.prompts or own)
