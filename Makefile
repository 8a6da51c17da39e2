# Two commands do all set-up on a fresh machine: `make reproduce` and `make test`. `make help` lists the rest.
PYTHON ?= python3
PAPER ?= all
PRESET ?= laptop
BIN = .venv/bin
export OMP_NUM_THREADS ?= 1

.PHONY: help reproduce test lab readme benchmarks clean
help:            ## this list
	@grep -hE '^[a-z]+: .*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):[^#]*## ?/  make \1\t/' | expand -t 22

# A stamp that is older than what it was made from installs again.
.venv/.installed: pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "No $(PYTHON) found. Install Python 3.11 or newer, or: make PYTHON=/path/to/python"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed, $(PYTHON) is $$($(PYTHON) -V). Use: make PYTHON=python3.11"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "Python's venv module is missing. On Debian: apt install python3-venv"; exit 1; }
	@echo "Setting up .venv (once; one to two minutes, more where torch has to be downloaded with CUDA) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

reproduce: .venv/.installed  ## run the paper notebooks and render reports/index.html (PAPER=unionmask PRESET=smoke narrow it)
	@$(BIN)/sparsedarts reproduce $(PAPER) --preset $(PRESET)

test: .venv/.installed       ## everything: notebooks in sync, every notebook executed, tests/
	$(BIN)/nbdev_test --n_workers 2
	$(BIN)/python -m pytest -n 2 --dist loadfile tests

lab: .venv/.installed        ## JupyterLab at the first notebook to read
	$(BIN)/jupyter lab nbs/papers/unionmask.ipynb

readme: .venv/.installed     ## fill README's table from the committed sample results
	$(BIN)/sparsedarts report --readme README.md

benchmarks: .venv/.installed ## speed ratios against the classic way (some minutes, idle machine)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/masking.py --threshold
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/holding.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/data.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/training.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/scored.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/initialisation.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/supernet.py

clean:           ## forget runs and rendered pages (keeps .venv and committed samples)
	rm -rf reports/runs reports/pages reports/index.html
