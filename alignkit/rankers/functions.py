"""A user's own ranker: "package.module:function", or the name of an entry point of the group `alignkit.rankers`."""

import asyncio
import importlib
import inspect
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from alignkit.errors import ConfigError, DataError
from alignkit.media.videos import read_video
from alignkit.rankers.protocol import Comparison

GROUP = "alignkit.rankers"


class ByFunction:
    """function(prompt, video_a, video_b) → P(a is better), videos uint8 [F, H, W, 3]; it may be `async`. An attribute
    `at_once` of the function says how many comparisons it takes at the same time (1)."""

    def __init__(self, who: str, function: Callable[..., Any]):
        self.who, self._function = who, function
        self.at_once = int(getattr(function, "at_once", 1))

    async def prepare(self, comparisons: Sequence[Comparison]) -> None:
        pass

    async def compare(self, prompt: str, video_a: Path, video_b: Path) -> float:
        frames = read_video(video_a), read_video(video_b)
        try:
            if inspect.iscoroutinefunction(self._function):
                return await self._function(prompt, *frames)
            return await asyncio.to_thread(self._function, prompt, *frames)
        except Exception as error:
            what = f"{type(error).__name__}: {error}".split("\n")[0]
            raise DataError(f"{self.who}: failed on {video_a.name} and {video_b.name} ({what})") from error


def find_function(name: str) -> Callable[..., Any]:
    """What `ranker.by` names. Raises ConfigError for what is not there, fails to import or cannot be called."""
    registered = {point.name: point for point in entry_points(group=GROUP)}
    try:
        if name in registered:
            found = registered[name].load()
        else:
            module, _, attribute = name.partition(":")
            found = getattr(importlib.import_module(module), attribute)
    except Exception as error:
        what = f"{type(error).__name__}: {error}".split("\n")[0]
        raise ConfigError(
            f"ranker.by: {name!r} cannot be imported ({what}); give package.module:function, with its folder on "
            "PYTHONPATH"
        ) from error
    if not callable(found):
        raise ConfigError(f"ranker.by: {name!r} is no function but {type(found).__name__}")
    return found
