# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV   ?= .venv
JOBS   ?= 2
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
BUILT_FROM := pyproject.toml setup.py CMakeLists.txt $(wildcard csrc/*.cpp csrc/*.hpp)

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow tiny-pair lint format build clean

help:  ## print the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(STAMP)  ## set up, then solve a handful of problems with the embedded pair
	@$(BIN)/splitdecode demo

test: $(STAMP)  ## set up, then run the tests (under five minutes on two cores)
	$(BIN)/python -m pytest -q -n $(JOBS) -m "not slow and not gpu"

test-slow: $(STAMP)  ## the long proofs
	$(BIN)/python -m pytest -q -n $(JOBS) --dist loadgroup -m "slow and not gpu"

tiny-pair: $(STAMP)  ## the embedded pair from nothing, into the package (up to 90 minutes on two cores)
	$(BIN)/python benchmarks/tiny_pair.py --install

lint: $(STAMP)  ## ruff, mypy --strict on src, clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror csrc/*.cpp csrc/*.hpp tests/csrc/*.cpp tests/csrc/*.hpp

format: $(STAMP)  ## rewrite the sources in the house format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i csrc/*.cpp csrc/*.hpp tests/csrc/*.cpp tests/csrc/*.hpp

build: $(STAMP)  ## the environment and the extension only

clean:  ## remove what the build made (not the environment)
	rm -rf build dist *.egg-info src/*.egg-info src/splitdecode/*.so $(STAMP)

$(STAMP): $(BUILT_FROM)
	@$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "splitdecode needs Python >= 3.11, this is " + sys.version' \
		|| { echo "name another interpreter: make PYTHON=python3.12 ..."; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test,lint]'
	@touch $@
