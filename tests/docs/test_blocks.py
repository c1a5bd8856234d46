"""Every block of code in the documentation is run, or read by what would run it; what cannot be is marked, counted."""

import json
import re
from collections import defaultdict

import pytest
import yaml
from doc_blocks import PAGES, ROOT, all_blocks, blocks_of

from alignkit.stores.pairs import PairStore

KINDS = {"bash", "python", "yaml", "json", "text"}
CONFIG = ROOT / "configs" / "wan-tiny-localdpo.yaml"
RUN = {"start.md"}
"""Pages whose commands are run, on settings of seconds; those of others are read by the command line and the reader."""
ELSEWHERE = {"kernels.md"}
"""Pages whose Python has a test of its own (tests/kernels/test_recipes.py), which needs torch alone."""


def test_every_block_says_what_it_is_and_none_is_by_indentation_alone():
    for page in PAGES:
        kinds = {block.place: block.kind for block in blocks_of(page)}
        assert set(kinds.values()) <= KINDS, {place: kind for place, kind in kinds.items() if kind not in KINDS}
        assert len(re.findall(r"^ *```", page.read_text(), re.M)) == 2 * len(kinds), page
        prose = re.sub(r"^( *)```.*?^\1```", "", page.read_text(), flags=re.M | re.S)
        assert not re.search(r"\n\n    [^\s`<\-]", prose), page


def test_files_that_pages_name_are_there():
    named = re.compile(r"`((?:tests|alignkit|benchmarks|configs|examples|docs|kernels)/[a-z0-9_./-]+)`")
    for page in [*PAGES, *(ROOT / "docs" / "reference").glob("*.md")]:
        for name in named.findall(page.read_text()):
            assert (ROOT / name).exists() or (ROOT / "kernels" / name).exists(), f"{page.name}: {name}"


def test_links_of_the_readme_lead_somewhere():
    """`make docs` looks after those of all other pages."""
    for file, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", (ROOT / "README.md").read_text()):
        target = ROOT / (file or "README.md")
        assert target.exists(), file
        headings = re.findall(r"^#+ (.+)$", target.read_text(), re.M) if anchor else []
        assert not anchor or anchor in {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}, anchor


def test_blocks_that_cannot_be_run_are_as_many_as_the_documentation_says():
    marked = [block for block in all_blocks() if block.reason]
    print(*(f"{block.place}: {block.reason}" for block in marked), sep="\n")
    said = re.search(r"\*\*(\d+) blocks cannot run", (ROOT / "docs" / "tested.md").read_text())
    assert int(said[1]) == len(marked)


@pytest.mark.parametrize("page", sorted({block.page for block in all_blocks("bash")}), ids=lambda page: page.name)
def test_commands_are_known_and_their_configurations_read(page, shell, really):
    for block in blocks_of(page):
        if block.kind == "bash" and block.reason is None:
            shell(block.filled_in, *([really] if page.name in RUN else []))


@pytest.mark.parametrize("block", all_blocks("yaml"), ids=lambda block: block.place)
def test_configurations_are_read(block, tmp_path):
    from alignkit.config import load_config
    from alignkit.stages import stage_configs

    (tmp_path / "run.yaml").write_text(block.text)
    config = load_config(tmp_path / "run.yaml", ["output.dir=runs/mine"])  # which a part of a file leaves out
    assert len(stage_configs(config)) == len(config.stages or ())


@pytest.mark.parametrize("block", all_blocks("json"), ids=lambda block: block.place)
def test_lines_of_json_are_lines_of_json(block):
    assert all(isinstance(json.loads(line), dict) for line in block.text.splitlines())


def python_by_page():
    found = defaultdict(list)
    for block in all_blocks("python"):
        if "--8<--" in block.text:  # a file, whole: it is there, and tested as what it is
            (name,) = re.findall(r'--8<-- "(.+)"', block.text)
            assert (ROOT / name).is_file() and name.startswith("examples/"), block.place
        elif block.page.name not in ELSEWHERE:
            found[block.page].append(block)
    return found


@pytest.mark.parametrize("page", sorted(python_by_page()), ids=lambda page: page.name)
def test_python_of_a_page_runs(page, command, shell, really, workspace):
    """All of a page in a row, after its commands where those are run."""
    blocks = python_by_page()[page]
    code = "\n".join(block.text for block in blocks)
    if "runs/mine/export" in code:  # by the story of the first page, which is run once
        (story,) = (b.text for b in blocks_of(ROOT / "docs" / "start.md") if "output.dir=runs/mine" in b.text)
        shell(story, really)
    done = command(python=("-c", f"import os; os.chdir({str(workspace)!r})\n{code}"))
    assert done.returncode == 0, done.stderr[-2000:]
    printed = [b.text for b in blocks_of(page) if b.kind == "text"] if done.stdout else []
    assert not done.stdout or done.stdout in printed, f"the page prints something else:\n{done.stdout}"


def test_two_sizes_in_a_chain_make_pairs_of_both_and_train_on_them(command, overrides, clips, tmp_path):
    """The page says that this is run: its configuration, a step a stage."""
    (block,) = (b for b in all_blocks("yaml") if b.page.name == "mixed.md")
    said = yaml.safe_load(block.text.replace("wide", str(clips)).replace("upright", str(clips)).replace("40", "1"))
    keys = [f"{section}={json.dumps(value)}" for section, value in said.items()]
    out = tmp_path / "run"
    own = [key for key in overrides(out)[2:] if not key.startswith("data.")]
    for name in ("pairs", "train"):
        done = command(name, CONFIG, *keys, *own, f"output.dir={out}", "train.steps=1")
        assert done.returncode == 0, done.stderr[-2000:]
    folders = out / "pairs" / "train", out / "stages" / "02-offline" / "pairs" / "train"
    sizes = [tuple(PairStore(folder)[0].winner.shape[-2:]) for folder in folders]
    assert sizes[0] == sizes[1][::-1] != sizes[1] and (out / "export" / "model_index.json").exists()


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) < 200


def test_the_story_for_your_own_videos_runs(shell, really):
    text = (ROOT / "examples" / "own_videos.sh").read_text()
    shell(text, really, "clips", "runs/mine")


def test_the_benchmark_of_the_examples_compares_before_it_times(command):
    code = f"import runpy; runpy.run_path({str(ROOT / 'examples' / 'benchmark_kernels.py')!r}, run_name='__main__')"
    done = command(python=("-c", code))
    assert done.returncode == 0 and "equal in all" in done.stdout, done.stderr[-2000:]


def test_every_example_is_run_by_a_test():
    examples = {path.name for path in (ROOT / "examples").iterdir()} - {"__pycache__"}
    in_their_own = {"another_trainer"}  # tests/kernels/test_recipes.py
    assert examples == {"own_videos.sh", "benchmark_kernels.py"} | in_their_own
