# Set-up and daily commands; `make` lists them. Each command prepares what it needs by itself:
# .venv, the packages of every extra and the compiled kernels, and none of them twice.

PYTHON ?= python3
METHOD ?= swav
ARGS ?=

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check -q
INSTALLED := $(VENV)/.fastcl-installed
TTSEM := $(VENV)/.fastcl-ttsem
DOCS := $(VENV)/.fastcl-docs
KERNELS := fastcl/_C/_build.json
# pyproject.toml's extra of that name, by itself: nothing but `make docs` needs it.
DOCS_REQUIRES := "sphinx>=8" "furo>=2024.8" "myst-parser>=4"
EXTRAS := train,test,bench,dev
# pyproject.toml's build-system.requires, in the environment itself: ninja then compiles only what
# changed, where an isolated build would start anew.
BUILD_REQUIRES := "setuptools>=77" wheel "pybind11>=2.12" ninja

.DEFAULT_GOAL := help
.PHONY: help train test bench aot sanitize docs lint format build wheel release-check clean

help:
	@echo "make train   train a method on the embedded images: METHOD=$(METHOD), more flags in ARGS=\"--epochs 5\""
	@echo "make test    every test; pytest's flags in ARGS=\"-k sinkhorn\""
	@echo "make bench   the operations against plain PyTorch and torch.compile; flags in ARGS"
	@echo "make aot     compile every Triton launch for every GPU (an hour or more of a core, the first time); pytest's flags in ARGS"
	@echo "make sanitize  the compiled kernels over odd sizes under the address and undefined-behaviour sanitizers"
	@echo "make docs    the documentation as HTML, in build/docs"
	@echo "make lint    ruff, mypy and clang-format, changing nothing"
	@echo "make format  ruff and clang-format, in place"
	@echo "make build   compile csrc/ into fastcl/_C"
	@echo "make wheel   dist/fastcl-*.whl"
	@echo "make release-check  sdist and wheel, the wheel tested with two releases of torch; others in ARGS=\"--torch 2.12.0\""
	@echo "make clean   remove what was built; .venv stays"
	@echo "PYTHON=python3.12 chooses the interpreter of .venv, CXX=clang++ the compiler."

train: $(INSTALLED) $(KERNELS)
	$(PY) -m fastcl.train --method $(METHOD) $(ARGS)

test: $(INSTALLED) $(KERNELS) $(TTSEM)
	$(PY) tests/run_all.py $(ARGS)

bench: $(INSTALLED) $(KERNELS)
	$(PY) -m bench $(ARGS)

aot: $(INSTALLED)
	FASTCL_AOT=full $(PY) -m pytest tests/triton/aot $(ARGS)

sanitize: $(INSTALLED)
	$(check_compiler)
	$(PY) tests/sanitize.py $(ARGS)

docs: $(INSTALLED) $(DOCS)
	$(PY) -m sphinx -q -W --keep-going -b html docs build/docs $(ARGS)
	@echo "build/docs/index.html"

lint: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run -Werror csrc/*.cpp csrc/*.h

format: $(INSTALLED)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i csrc/*.cpp csrc/*.h

build: $(INSTALLED) $(KERNELS)

wheel: $(INSTALLED)
	$(PIP) wheel --no-deps --no-build-isolation -w dist .
	@ls dist/*.whl

release-check: $(INSTALLED)
	$(check_compiler)
	$(PY) tests/release.py $(ARGS)

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .benchmarks
	rm -f fastcl/_C/*.so $(KERNELS)
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# ---- set-up ------------------------------------------------------------------------------------

$(PY):
	@command -v $(PYTHON) >/dev/null || \
	    { echo "fastcl: no $(PYTHON) found; install Python 3.10 or newer, or give one: PYTHON=/path/to/python" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "fastcl: needs Python 3.10 or newer; $(PYTHON) is $$($(PYTHON) -V 2>&1). Give another: PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	    { echo "fastcl: $(PYTHON) has no venv module; on Debian: apt-get install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

define check_compiler
@command -v "$${CXX%% *}" >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null || \
    { echo "fastcl: no C++ compiler found; install g++ or clang++ (on Debian: apt-get install g++), or give one: CXX=/path/to/g++" >&2; exit 1; }
@$(PY) -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_paths()["include"] + "/Python.h"))' || \
    { echo "fastcl: Python.h is missing; on Debian: apt-get install python3-dev" >&2; exit 1; }
endef

# --no-compile: bytecode is written when a module is first imported; most of these never are.
# The kernels are compiled while pip looks for packages; its own build then finds nothing to do, or
# says why it fails.
$(INSTALLED): pyproject.toml setup.py | $(PY)
	$(check_compiler)
	@echo "Installing fastcl[$(EXTRAS)] into $(VENV): the first time some minutes, most of them torch's"
	$(PIP) install $(BUILD_REQUIRES)
	@FASTCL_REQUIRE_COMPILER=1 $(PY) setup.py -q build_ext --inplace >/dev/null 2>&1 & \
	    FASTCL_REQUIRE_COMPILER=1 $(PIP) install --no-compile --no-build-isolation -e ".[$(EXTRAS)]"; \
	    status=$$?; wait; exit $$status
	@touch $@

$(KERNELS): setup.py $(wildcard csrc/*) | $(INSTALLED)
	$(check_compiler)
	@echo "Compiling csrc/"
	@FASTCL_REQUIRE_COMPILER=1 $(PY) setup.py -q build_ext --inplace
	@touch $@

$(DOCS): Makefile | $(INSTALLED)
	$(PIP) install $(DOCS_REQUIRES)
	@touch $@

# Runs the Triton kernels without a GPU. Its tests are skipped, saying so, where it cannot be had;
# it asks for Python 3.12 and runs on 3.11.
$(TTSEM): | $(INSTALLED)
	@if $(PY) -c 'import sys; sys.exit(sys.version_info < (3, 11))' && \
	    $(PIP) install --no-deps --ignore-requires-python ttsem==0.1.0; then touch $@; \
	    else echo "fastcl: ttsem could not be installed, which needs Python 3.11; tests/triton/gpu needs a GPU then"; fi
