# Everything one can do here. `make help` lists it.
#
# The first target that needs Python sets it up: a virtual environment in .venv, on top of an
# installed torch if there is one, else with the torch pinned below. To use a Python as it is,
# with nothing but this package installed into it (offline, or in an image that has it all):
#     make test PYTHON=python3

PYTHON := .venv/bin/python
TORCH := torch==2.13.0

C_FILES = $(shell find csrc tests/c -name '*.[ch]' -o -name '*.cpp' -o -name '*.inl' -o -name '*.cu' -o -name '*.cuh')
BUILT_FROM = pyproject.toml setup.py $(shell find csrc -type f)

.DEFAULT_GOAL := help
.PHONY: help demo test notebooks bench bench-gpu paper train figures lint format asan sanitize clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-9s  %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# The stamps of a finished set-up, for the demo and for everything: who wants to see the demo need not
# wait for linters. They go where they vanish together with what they stand for.
ifeq ($(origin PYTHON),command line)
DEMO := build/.installed
INSTALLED := $(DEMO)
CLANG_FORMAT := clang-format

$(INSTALLED): $(BUILT_FROM)
	$(PYTHON) -m pip install --no-build-isolation --no-deps -e .
	@mkdir -p $(@D) && touch $@
else
DEMO := .venv/.demo
INSTALLED := .venv/.installed
CLANG_FORMAT := PATH=.venv/bin:$$PATH clang-format

.venv/bin/python:
	@python3 -c 'import ensurepip, venv' || { \
	    echo "python3 cannot make virtual environments: install its venv package" \
	         "(Debian, Ubuntu: apt-get install python3-venv)" >&2; exit 1; }
	python3 -m venv $$(python3 -c 'import torch' 2>/dev/null && echo --system-site-packages) .venv

$(DEMO): EXTRAS := demo
$(INSTALLED): EXTRAS := demo,dev,notebooks
$(DEMO) $(INSTALLED): $(BUILT_FROM) | .venv/bin/python
	@$(PYTHON) -c 'import torch' 2>/dev/null || $(PYTHON) -m pip install $(TORCH)
	@$(PYTHON) -m pip install 'setuptools>=64' wheel && \
	    $(PYTHON) -m pip install --no-build-isolation -e '.[$(EXTRAS)]' || { \
	    echo "Set-up failed, see above. Offline, with torch installed: make ... PYTHON=python3" >&2; \
	    exit 1; }
	@touch $@
endif

demo: $(DEMO) ## train a small GPT with three attentions and compare them (under 3 minutes)
	$(PYTHON) examples/train_gpt.py

test: $(INSTALLED) ## run the test suite
	$(PYTHON) -m pytest

notebooks: $(INSTALLED) ## run the four notebooks with the checks in them (3 minutes)
	$(PYTHON) -m pytest --nbmake --nbmake-timeout=300 notebooks

bench: $(INSTALLED) ## time ours against PyTorch's on the CPU, then update README and plots (10 minutes)
	$(PYTHON) benchmarks/cpu.py
	$(PYTHON) benchmarks/report.py

bench-gpu: $(INSTALLED) ## likewise against all of SDPA's backends on a GPU (20 minutes)
	$(PYTHON) benchmarks/gpu.py --how hot cool graph
	$(PYTHON) benchmarks/report.py

paper: $(INSTALLED) ## measure the tables of the FlashAttention paper, on a GPU if there is one (5 minutes)
	$(PYTHON) benchmarks/paper.py
	$(PYTHON) benchmarks/report.py

train: $(INSTALLED) ## train GPT-2 small and medium of `transformers` on a GPU, with PyTorch's attention and ours (5 minutes)
	$(PYTHON) -m pip install transformers
	$(PYTHON) benchmarks/train_gpt2.py
	$(PYTHON) benchmarks/report.py

figures: $(INSTALLED) ## draw the pictures of the documentation again
	$(PYTHON) docs/draw_tiles.py
	$(PYTHON) docs/draw_series.py

lint: $(INSTALLED) ## check style: ruff and clang-format
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(CLANG_FORMAT) --dry-run -Werror $(C_FILES)

format: $(INSTALLED) ## put everything into style
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .
	$(CLANG_FORMAT) -i $(C_FILES)

asan: ## the C code, without Python, under the address, UB and thread sanitizers
	$(MAKE) -C tests/c asan
	$(MAKE) -C tests/c tsan
	$(MAKE) -C tests/c engine

# Checked first, so that what is compiled is in the cache. PyTorch's own kernels are not checked, and
# neither is what its libraries ask the driver in vain.
COMPUTE_SANITIZER := compute-sanitizer
sanitize: $(INSTALLED) ## the CUDA kernels under compute-sanitizer (pip: nvidia-cuda-sanitizer-api)
	$(PYTHON) tests/sanitize.py
	for tool in memcheck initcheck racecheck synccheck; do \
	    PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(COMPUTE_SANITIZER) --tool $$tool --error-exitcode 1 \
	        --kernel-name kernel_substring=fa_ --report-api-errors no \
	        $(PYTHON) tests/sanitize.py --run || exit 1; \
	done

clean: ## remove everything built, the virtual environment too
	rm -rf .venv build dist tests/c/build *.egg-info flash_attn_ext/*.so demo.png
	find . -name __pycache__ -type d -prune -exec rm -r {} +
