"""What the site has from outside docs/: pages of the repository's root, the examples, and links to other files.

In the text links are as GitHub has them, relative to the file. A link to a file of the repository that is no part of
the site becomes its name; one to a file that does not exist is a warning, which `make docs` fails on.
"""

import logging
import os
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
PAGES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#\s]+)(#[^)\s]*)?\)")
FENCE = re.compile(r"(^```.*?^```)", re.M | re.S)
log = logging.getLogger("mkdocs.hooks")


def on_files(files, config):
    for source, place in PAGES.items():
        files.append(File.generated(config, place, abs_src_path=str(ROOT / source)))
    for example in sorted((ROOT / "examples").rglob("*")):
        if example.suffix in (".py", ".sh", ".yaml"):
            place = example.relative_to(ROOT).as_posix()
            files.append(File.generated(config, place, abs_src_path=str(example)))
    return files


def on_page_markdown(markdown, page, config, files):
    folder = Path(page.file.abs_src_path).parent

    def link(found: re.Match) -> str:
        mark, text, target, anchor = found[1], found[2], found[3], found[4] or ""
        if re.match(r"[a-z]+:", target):
            return found[0]
        place = Path(os.path.normpath(folder / target))
        if not place.exists():
            log.warning(f"{page.file.src_uri}: {target} is linked to and does not exist")
        if not place.is_relative_to(ROOT):
            return found[0]
        name = place.relative_to(ROOT).as_posix()
        uri = PAGES.get(name) or (name.removeprefix("docs/") if name.startswith(("docs/", "examples/")) else None)
        if uri is None or files.get_file_from_path(uri) is None:
            return text
        return f"{mark}[{text}]({os.path.relpath(uri, Path(page.file.src_uri).parent)}{anchor})"

    return "".join(part if part.startswith("```") else LINK.sub(link, part) for part in FENCE.split(markdown))
