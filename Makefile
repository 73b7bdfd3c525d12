# make demo    the main job: fine-tune a 135M Mistral in 4 bits and show what it learned
# make test    lint, then every test that this machine can run
# make bench   the kernels against bitsandbytes: the GPU's where there is one, else the CPU's
#
# Each makes the virtual environment first if it is missing, and builds again when the C++ sources have changed.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
SOURCES := pyproject.toml constraints.txt CMakeLists.txt $(shell find csrc build_backend -type f)
CXX_FILES := $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

.PHONY: env demo test lint format bench clean

env: $(VENV)/.installed

# torch first and by its pinned version: the build takes the headers of the torch that is there.
$(VENV)/.installed: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c constraints.txt torch numpy
	$(PIP) install -q -c constraints.txt -e '.[train,metrics,bench,dev]'
	$(BIN)/python -c 'import pyquant; pyquant.show_config()'
	touch $@

demo: env
	$(BIN)/pyquant demo $(ARGS)

test: env lint
	$(BIN)/python -m pytest $(ARGS)

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

format: env
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

bench: env
	$(BIN)/pyquant bench kernels $(ARGS)

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache
