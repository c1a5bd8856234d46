# make demo   sets everything up, runs the main job on this machine, says where its report is
# make test   sets everything up, runs the tests
# make matrix every preset, dtype, kind of weights, reference and number of processes: trained, stopped, resumed, exported
# make faults commands broken in every way known to us, and what came of each
# make walk   three newcomers walk the site in fresh clones; writes docs/walk.md
# make lint   ruff, which mends what it can, and mypy
# make bench  sets everything up, times the kernels (on a machine without a GPU: their reference), draws the plot
# make reference  writes docs/reference/ anew from the code
# make docs   builds the documentation's site into out/site, offline; a dead link or anchor fails
# make setup  the set-up alone: .venv with the tested versions; a second call installs nothing

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TYPES = $(BIN)/mypy --config-file kernels/pyproject.toml kernels/alignkit_kernels && $(BIN)/mypy

.PHONY: setup demo test matrix faults walk lint reference docs bench bench-step clean

setup: $(STAMP)

$(STAMP): pyproject.toml kernels/pyproject.toml constraints.txt .ci/check_machine.py
	@command -v $(PYTHON) >/dev/null || { echo "make setup: $(PYTHON) is missing; install Python 3.11 or newer, or call make PYTHON=..." >&2; exit 2; }
	@$(PYTHON) .ci/check_machine.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --progress-bar off -c constraints.txt -e ./kernels -e '.[train,rank,bench,docs,dev]'
	@$(BIN)/python -m alignkit.training.distributed
	@touch $@

demo: setup
	$(BIN)/alignkit demo

matrix: setup
	$(BIN)/python tests/training/matrix.py

faults: setup
	$(BIN)/python tests/faults/campaign.py

walk: setup
	$(BIN)/python tests/docs/walk.py

test: setup
	$(BIN)/ruff check .
	$(TYPES)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

bench: setup
	$(BIN)/python -m pytest -q benchmarks
	$(BIN)/python benchmarks/plot.py

bench-step: setup
	$(BIN)/python benchmarks/step.py

lint: setup
	$(BIN)/ruff check --fix .
	$(TYPES)

reference: setup
	$(BIN)/python -m alignkit.reference

docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "the site: out/site/index.html; with its search: $(BIN)/python -m http.server -d out/site"

clean:
	rm -rf $(VENV) runs .pytest_cache .ruff_cache .mypy_cache
