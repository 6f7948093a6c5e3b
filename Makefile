# Everything runs in .venv; nothing is installed outside this folder.
PYTHON ?= python3
UV := $(shell command -v uv 2>/dev/null || echo build/tools/bin/uv)
RUN := .venv/bin

.PHONY: setup demo test lint bench clean

setup: .venv/.ready  ## make .venv with the package and its developer tools

build/tools/bin/uv:
	$(PYTHON) -m venv build/tools
	build/tools/bin/python -m pip install --quiet --disable-pip-version-check uv

.venv/.ready: pyproject.toml | $(filter build/%,$(UV))
	$(UV) venv --quiet --allow-existing .venv
	$(UV) pip install --quiet --python .venv/bin/python --editable '.[dev]'
	@touch $@

demo: setup  ## train a small model on real digits, compress it, compile it, serve it
	$(RUN)/python examples/demo.py

test: setup  ## the whole test suite on the CPU
	JAX_PLATFORMS=cpu $(RUN)/python -m pytest -n 2 --dist worksteal

lint: setup  ## formatting, lint and types
	$(RUN)/ruff format --check .
	$(RUN)/ruff check .
	$(RUN)/pyright

bench: setup  ## every benchmark; each prints the command that repeats it
	$(RUN)/python benchmarks/loading.py
	$(RUN)/python benchmarks/storage.py
	$(RUN)/python benchmarks/long_bodies.py
	$(RUN)/python benchmarks/clients.py
	$(RUN)/python benchmarks/optimizing.py --no-pages
	$(RUN)/python benchmarks/quantization.py --no-pages
	$(RUN)/python benchmarks/qat.py --no-pages
	$(RUN)/python benchmarks/pruning.py --no-pages

clean:
	rm -rf .venv build dist
