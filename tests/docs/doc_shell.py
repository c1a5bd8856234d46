"""Runs blocks of bash by bash itself, with every command that they give handed over to the test.

Nothing else is on the PATH: a block with another command fails, unless it is marked as what cannot be run.
"""

import os
import select
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

COMMANDS = ("alignkit", "make", "python", "pip", "torchrun", "deepspeed", "srun", "sbatch")
# A pipe of requests and one of answers; a request is its words, each ended by a zero, and a newline ends it.
SHIM = """#!/bin/bash
printf '%s\\0' "${0##*/}" "$PWD" "${PYTHONPATH-}" "$@" >> "$JOBS/words"
echo >> "$JOBS/request"
read -r code < "$JOBS/answer"
while IFS= read -r line; do printf '%s\\n' "$line"; done < "$JOBS/out"
exit "$code"
"""


class Call(NamedTuple):
    """A command as bash hands it over: its name, folder, PYTHONPATH and words."""

    name: str
    cwd: Path
    python_path: str
    words: list[str]


Answer = tuple[int, str]
"""Exit code and what it printed."""


def run_block(text: str, cwd: Path, jobs: Path, answer: Callable[[Call], Answer], *arguments: str) -> str:
    """What the block, or a script's text with its arguments, prints. Raises AssertionError where it fails."""
    bin = jobs / "bin"
    if not bin.exists():
        bin.mkdir(parents=True)
        for name in COMMANDS:
            (bin / name).write_text(SHIM)
            (bin / name).chmod(0o755)
        for name in ("request", "answer"):
            os.mkfifo(jobs / name)
    (jobs / "words").write_bytes(b"")
    environment = {"PATH": str(bin), "JOBS": str(jobs), "HOME": str(cwd)}
    request = os.open(jobs / "request", os.O_RDWR)
    replies = os.open(jobs / "answer", os.O_RDWR)
    child = subprocess.Popen(
        ["/bin/bash", "-euo", "pipefail", "-c", text, "block", *arguments], cwd=cwd, env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        while child.poll() is None:
            if select.select([request], [], [], 0.05)[0]:
                os.read(request, 1)
                name, folder, path, *words = (jobs / "words").read_bytes().decode().split("\0")[:-1]
                (jobs / "words").write_bytes(b"")
                code, said = answer(Call(name, Path(folder), path, words))
                (jobs / "out").write_text(said)
                os.write(replies, f"{code}\n".encode())
    finally:
        os.close(request)
        os.close(replies)
        child.kill()
    said = child.stdout.read()
    assert child.returncode == 0, f"exit code {child.returncode}\n{text}\n{said}"
    return said
