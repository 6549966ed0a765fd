# Every target works alone and first on a fresh clone: it makes the environment in .venv if there is none yet.
#   make setup       the environment (again whenever pyproject.toml or constraints.txt changes)
#   make reproduce   run the notebooks of PROFILE to figures, tables and runs/PROFILE/index.html
#   make figures     the same, then copy the results to figures/PROFILE/
#   make docs        the site of RUN (or of the committed results, where there is no run): site/index.html, without network
#   make lab         the tutorials in JupyterLab
#   make explorer    the explorer as an app in the browser
#   make test        the tests: about 12 minutes on two cores; ARGS="-m 'not slow'" takes 3
#   make lint        style and import contracts
#   make lock        constraints.txt: the newest versions that pyproject.toml allows; torch stays as it is pinned
#
# Variables: PROFILE=tiny|small|paper   RUN=runs/PROFILE   ARGS="--only table2"   PYTHON=python3.12
#   TORCH_INDEX=https://download.pytorch.org/whl/cpu   a machine without GPU: torch without the CUDA libraries
#   USE_UV=1                                           install with uv (if on PATH) instead of pip

PROFILE ?= tiny
PYTHON ?= python3
ARGS ?=
RUN ?= runs/$(PROFILE)
BIN := .venv/bin
READY := .venv/.ready
TORCH := $(shell grep '^torch==' constraints.txt)

ifeq ($(USE_UV),1)
UV := $(shell command -v uv)
# uv does not read pip's settings, and without pip's own wheel folders it would choose other builds of torch.
LINKS := $(or $(UV_FIND_LINKS),$(PIP_FIND_LINKS),$(shell $(PYTHON) -m pip config get global.find-links 2>/dev/null))
export UV_FIND_LINKS := $(shell echo $(LINKS) | tr ' ' ',')
endif
INSTALL := $(if $(UV),$(UV) pip install --python $(BIN)/python,$(BIN)/python -m pip install)

.PHONY: help setup reproduce figures docs lab explorer test lint lock
help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(if $(TORCH_INDEX),$(INSTALL) --index-url $(TORCH_INDEX) "$(TORCH)")
	$(INSTALL) -c constraints.txt -e '.[all]'
	@touch $@

reproduce: $(READY)
	$(BIN)/medv reproduce --profile $(PROFILE) $(ARGS)

figures: $(READY)
	$(BIN)/medv reproduce --profile $(PROFILE) --publish $(ARGS)

docs: $(READY)
	$(BIN)/python -m medv.companion.site $(RUN) site $(ARGS)

# JupyterLab listens on this machine only, asks for the token that it prints, and asks nobody for news, updates or extensions.
QUIET := --LabApp.news_url=None --LabApp.check_for_updates_class=jupyterlab.handlers.announcements.NeverCheckForUpdate \
	--LabApp.extension_manager=readonly
lab: $(READY)
	$(BIN)/jupyter lab notebooks --ServerApp.ip=127.0.0.1 $(QUIET) $(if $(filter 0,$(shell id -u)),--allow-root) $(ARGS)

# The app too: this machine only, a token of its own, and no style sheet from a CDN (see medv/companion/explorer/app).
explorer: $(READY)
	JUPYTER_PATH=medv/companion/explorer/app $(BIN)/voila notebooks/50_explorer.ipynb --template=medv --Voila.ip=127.0.0.1 --token $(ARGS)

# One process a core, each with one thread, and neighbors together, which share fixtures; ARGS="-n 0" for one process.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal $(ARGS)

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports

# In an environment of its own, so that nothing that happens to be installed here is pinned.
lock:
	$(PYTHON) -m venv --clear .venv.lock
	.venv.lock/bin/python -m pip install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH)"
	.venv.lock/bin/python -m pip install "$(TORCH)" '.[all]'
	{ head -1 constraints.txt; echo "$(TORCH)"; \
	  .venv.lock/bin/python -m pip freeze --exclude medv --exclude torch | LC_ALL=C sort -f; } > constraints.new
	mv constraints.new constraints.txt
	rm -rf .venv.lock
