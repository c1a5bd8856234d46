"""What comes before a command's heavy imports: a look at what is there, a word that it starts, and quiet libraries."""

import logging
import os
import sys
from threading import Timer

from alignkit.config import Config, check_places, store_read
from alignkit.config.batches import accumulation_steps
from alignkit.launch import first_of_several, group_size
from alignkit.stages import stage_configs

NOTICE_S = 0.4  # until a command that is not over says that it starts


def look(command: str, config: Config, processes: int) -> None:
    """Check a command's stages and what it is to read, before anything heavy is imported, and say soon that it starts:
    those imports take seconds. Raises what the command itself would: of what is missing, its reader tells. processes:
    how many it is to start."""
    stage_configs(config)
    if command in ("train", "run", "demo") and not config.stages:
        accumulation_steps(config, max(processes, group_size(os.environ)))
    check_places(command, config)
    if command == "rollout":
        from alignkit.apo.prompts import read_prompts

        read_prompts(config.data.prompts)
    store = store_read(command, config)
    if store and not (store[0] / f"{store[1]}.json").exists():
        from alignkit.stores.store import read_info

        read_info(*store)
    if command == "report" and not (config.output.dir / "summary.json").exists():
        from alignkit.report.run import read_run

        read_run(config.output.dir)
    say_soon(f"{command}: starting, in {config.output.dir}")


def say_soon(word: str) -> None:
    """Of the processes of a command the first says so on standard error, where it is not over by then."""
    if first_of_several():
        notice = Timer(NOTICE_S, lambda: sys.stderr.write(f"{word}\n"))  # one write: others may say something then
        notice.daemon = True
        notice.start()


def quiet_libraries() -> None:
    """Loading bars and notices of the libraries would drown our own; their warnings stay, which may be of the user's
    model or text."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    notice = "Attention backends are an experimental feature"
    for name in ("diffusers.models.modeling_utils", "diffusers.models.attention_dispatch"):
        logging.getLogger(name).addFilter(lambda record: notice not in record.getMessage())
