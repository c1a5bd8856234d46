"""The blocks of code of a page, and whether they are marked as what cannot be run here."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    # those of the reference are written from the code, and held to it by tests/test_reference.py
    *sorted(page for page in (ROOT / "docs").rglob("*.md") if page.parent.name != "reference"),
]
PLACEHOLDERS = {
    "CONFIG": "wan-tiny-localdpo", "DIR": "clips", "OUT": "runs/out", "FILE": "prompts.txt", "RUN": "runs/mine",
    "RUNS": "runs", "FULL.yaml": "run.yaml", "HOST": "localhost", "NAME": "wan-tiny-localdpo",
}  # fmt: skip
"""Words that stand for the reader's own, and something for each."""
FENCE = re.compile(
    r"(?:^(?P<mark>[ ]*<!-- not run: (?P<reason>[^>]+) -->)\n)?"
    r"^(?P<indent>[ ]*)```(?P<kind>[\w.-]*)[ ]*\n(?P<text>.*?)^(?P=indent)```[ ]*$",
    re.M | re.S,
)


@dataclass(frozen=True)
class Block:
    """kind: bash, python, yaml, json or text. reason: why it cannot be run, None where it is."""

    page: Path
    line: int
    kind: str
    text: str
    reason: str | None

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def filled_in(self) -> str:
        """With something for each word that stands for the reader's own."""
        words = "|".join(map(re.escape, PLACEHOLDERS))
        return re.sub(rf"\b({words})\b", lambda found: PLACEHOLDERS[found[1]], self.text)


def blocks_of(page: Path) -> list[Block]:
    whole, found = page.read_text(), []
    for match in FENCE.finditer(whole):
        indent = match["indent"]
        text = "".join(line.removeprefix(indent) for line in match["text"].splitlines(keepends=True))
        line = whole.count("\n", 0, match.start("kind")) + 1
        found.append(Block(page, line, match["kind"], text, match["reason"]))
    return found


def all_blocks(*kinds: str) -> list[Block]:
    found = [block for page in PAGES for block in blocks_of(page)]
    return [block for block in found if block.kind in kinds and block.reason is None] if kinds else found
