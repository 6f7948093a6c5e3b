# Everything runs in .venv; nothing is installed outside this folder.
PYTHON ?= python3
UV := $(shell command -v uv 2>/dev/null || echo build/tools/bin/uv)
RUN := .venv/bin
# Where the environment has it set, each process that a test starts would compile all that it imports anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup kernels demo apps docs release check-release test test-all test-oldest test-memory lint bench clean

setup: .venv/.ready  ## make .venv with the package and its developer tools

build/tools/bin/uv:
	$(PYTHON) -m venv build/tools
	build/tools/bin/python -m pip install --quiet --disable-pip-version-check uv

.venv/.ready: pyproject.toml | $(filter build/%,$(UV))
	$(UV) venv --quiet --allow-existing .venv
	$(UV) pip install --quiet --python .venv/bin/python --editable '.[dev]'
	@touch $@

# The headers of XLA's FFI are those of the jaxlib that the kernels will be used with.
BUILD_KERNELS = $(UV) pip install --quiet --no-deps --no-build-isolation --reinstall-package lepton-xla-kernels --no-cache
CXX_FOUND := $(shell command -v $${CXX:-c++} || command -v g++ || command -v clang++)

build/kernels/.ready: .venv/.ready $(shell find kernels -type f -name '[!.]*' ! -path '*/__pycache__/*')
	$(BUILD_KERNELS) --python .venv/bin/python ./kernels
	@mkdir -p $(@D) && touch $@

ifneq ($(CXX_FOUND),)
kernels: build/kernels/.ready  ## build and install the CPU kernels, where there is a C++ compiler
else
kernels: setup
	@echo 'no C++ compiler: the CPU kernels are not built, XLA computes what they would, and their tests are skipped'
endif

demo: setup kernels  ## train a small model on real digits, compress it, compile it, serve it
	$(RUN)/python examples/demo.py

# Debian's promtool and amtool, unpacked and not installed: their tests are skipped where they cannot be had.
APT := apt-get -qq -o Acquire::Retries=2 -o Acquire::http::Timeout=20
build/prometheus/.ready:
	@mkdir -p $(@D)
	@cd $(@D) && { $(APT) download prometheus prometheus-alertmanager \
	|| { $(APT) update && $(APT) download prometheus prometheus-alertmanager; }; } 2>apt.log \
	&& for package in *.deb; do dpkg -x $$package . || exit 1; done && rm *.deb && touch .ready \
	|| echo 'no promtool and amtool from Debian (build/prometheus/apt.log): their tests are skipped'

# npm's mermaid, as a package of PyPI has it, for the manual's drawings; manual/hooks.py checks that it is that.
build/mermaid/.ready: .venv/.ready
	$(UV) pip install --quiet --no-deps --python .venv/bin/python --target build/mermaid artoo-mermaid==11.16.0
	@touch $@

build/site.ready: .venv/.ready build/mermaid/.ready mkdocs.yml $(shell find docs manual lepton_xla examples launch deploy -type f ! -name '*.pyc') $(wildcard *.md)
	NO_MKDOCS_2_WARNING=1 $(RUN)/python -m mkdocs build --strict --quiet
	@touch $@

docs: build/site.ready  ## the manual, in build/site; a warning is an error

test: setup kernels docs build/prometheus/.ready  ## the test suite on the CPU, without what is marked slow
	JAX_PLATFORMS=cpu $(RUN)/python -m pytest -n 2 --dist worksteal

build/model-signing/.ready: | $(filter build/%,$(UV))
	$(UV) venv --quiet --allow-existing build/model-signing
	$(UV) pip install --quiet --python build/model-signing/bin/python model-signing==1.1.1 pyopenssl
	@touch $@

test-all: setup kernels docs build/model-signing/.ready build/prometheus/.ready  ## every test: benchmarks, long simulations and long storms too
	JAX_PLATFORMS=cpu $(RUN)/python -m pytest -n 2 --dist worksteal -m ''

build/oldest-venv/.ready: pyproject.toml | $(filter build/%,$(UV))
	$(UV) venv --quiet --allow-existing build/oldest-venv
	$(UV) pip install --quiet --python build/oldest-venv/bin/python --resolution lowest-direct --editable '.[dev]'
	@touch $@

test-oldest: build/oldest-venv/.ready  ## the tests of TESTS on the oldest JAX, Flax and others that pyproject.toml allows
	JAX_PLATFORMS=cpu build/oldest-venv/bin/python -m pytest -n 2 --dist worksteal $(TESTS)

build/kernels-checked/.ready: build/kernels/.ready
	rm -rf $(@D)
	$(BUILD_KERNELS) --python .venv/bin/python --target $(@D) --config-settings=cmake.define.SANITIZE=ON ./kernels
	@touch $@

# A report goes to the process's standard error, where pytest must not keep it: the process ends with it.
test-memory: build/kernels-checked/.ready  ## the tests of the CPU kernels with AddressSanitizer and UBSan, on Linux with GCC
	LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0:use_sigaltstack=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
	PYTHONPATH=build/kernels-checked JAX_PLATFORMS=cpu $(RUN)/python -m pytest -n 0 --capture=sys tests/kernels

lint: setup docs  ## formatting, lint, types, and the manual
	$(RUN)/ruff format --check .
	$(RUN)/ruff check .
	$(RUN)/pyright

apps: setup kernels  ## every application of examples/apps; its figures are in build/apps/summary.json
	$(UV) pip install --quiet --python .venv/bin/python --editable '.[apps]'
	@missed=0; for app in examples/apps/*/run.py; do \
		echo "$$app"; JAX_COMPILATION_CACHE_DIR=$(CURDIR)/build/apps/xla $(RUN)/python $$app || missed=1; done; exit $$missed

build/release-venv/.ready: pyproject.toml | $(filter build/%,$(UV))
	rm -rf $(@D)
	$(UV) venv --quiet $(@D)
	$(UV) pip install --quiet --python $(@D)/bin/python --requirements pyproject.toml
	@touch $@

release: build/release-venv/.ready  ## wheel, source distribution, and a bill of materials (CycloneDX), in dist/
	rm -rf dist
	$(UV) build --quiet --python build/release-venv/bin/python --out-dir dist
	$(UV) tool run --quiet --python build/release-venv/bin/python --from cyclonedx-bom==7.5.0 cyclonedx-py environment --pyproject pyproject.toml \
		--mc-type library --spec-version 1.6 --output-reproducible --output-file dist/lepton_xla.cdx.json build/release-venv/bin/python
	@ls -l dist

check-release: setup  ## install both into empty environments outside of this folder, and pass the demo there
	JAX_PLATFORMS=cpu $(RUN)/python -m pytest -n 0 -m '' tests/release

bench: setup kernels  ## every benchmark; each prints the command that repeats it
	$(RUN)/python benchmarks/loading.py
	$(RUN)/python benchmarks/storage.py
	$(RUN)/python benchmarks/long_bodies.py
	$(RUN)/python benchmarks/clients.py
	$(RUN)/python benchmarks/replicas.py
	$(RUN)/python benchmarks/optimizing.py --no-pages
	$(RUN)/python benchmarks/starting.py --no-pages
	$(RUN)/python benchmarks/large.py --millions 200 --no-pages
	$(RUN)/python benchmarks/quantization.py --no-pages
	$(RUN)/python benchmarks/tuning.py --no-pages
	$(RUN)/python benchmarks/training.py --no-pages
	$(RUN)/python benchmarks/sizes.py
	$(RUN)/python benchmarks/kernels.py --no-pages
	$(RUN)/python benchmarks/qat.py --no-pages
	$(RUN)/python benchmarks/pruning.py --no-pages
	$(RUN)/python benchmarks/exports.py --models digits,residual,minilm --no-pages
	$(RUN)/python benchmarks/edge.py --no-pages
	$(RUN)/python benchmarks/distillation.py --no-pages
	$(RUN)/python benchmarks/federated.py --no-pages

clean:
	rm -rf .venv build dist
