# Everything from a clean clone, with nothing but python3 and make: `make help` lists what there is.

# uv installs Python packages from the lock file. Where there is none, a private one is put into .uv/.
UV_VERSION := 0.13.9
UV ?= $(or $(shell command -v uv 2>/dev/null),.uv/bin/uv)

# Which torch: `default` is the registry's build (on Linux with CUDA, several GB), `cpu` the small CPU-only one.
# Said once, it holds for this clone until the other one is asked for.
INSTALLED := $(shell cat .venv/.torch 2>/dev/null)
TORCH ?= $(or $(INSTALLED),default)
# The requirement that TORCH=cpu installs: the locked version, unless another version or a wheel is named.
TORCH_SPEC ?= torch==$(shell sed -n '/^name = "torch"$$/{n;s/^version = "\(.*\)"$$/\1/p;}' uv.lock)

ifeq ($(filter default cpu,$(TORCH)),)
$(error TORCH: found "$(TORCH)", expected "default" or "cpu")
endif

# The environment of this clone and no other, whichever is active in the shell.
unexport VIRTUAL_ENV CONDA_PREFIX
export UV_PROJECT_ENVIRONMENT := .venv

RUN := $(UV) run --no-sync
# Models in tests are tiny: one thread each is fastest, and the cores share the files of tests.
PYTEST := OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(RUN) pytest -n auto --maxprocesses 8 --dist loadfile

# What `make bench` runs, each benchmarks/NAME.py, and where it leaves NAME.json and NAME.png.
BENCHES ?= vs_trl decoding scaling roofline control
BENCH_FOLDER ?= runs/bench
# control.py has settings of its own: a quick look at the others is a quick look at it
CONTROL_ARGS ?= $(if $(findstring --quick,$(ARGS)),--steps 4096 --repeats 1)

.PHONY: help demo real test test-all test-avx2 test-real bench lint format sync sync-real browser FORCE
.NOTPARALLEL:

help:
	@echo "make demo       PPO teaches a small language model arithmetic, in minutes   (options: ARGS=...)"
	@echo "make real       PPO on SmolLM2, a real chat model of 135 million parameters; a quarter of an hour"
	@echo "make test       the tests, without the slow ones                            (options: ARGS=...)"
	@echo "make test-all   all tests                                                   (options: ARGS=...)"
	@echo "make test-avx2  those that a processor may change, with no more than AVX2's instructions"
	@echo "make test-real  those on SmolLM2, which it downloads (93 MB) and which no other tests need"
	@echo "make bench      speed and memory, beside others; hours, on an idle machine  (options: ARGS=--quick, BENCHES=...)"
	@echo "make lint       ruff and mypy"
	@echo "make format     let ruff rewrite what it can"
	@echo "make sync       only install into .venv"
	@echo "make browser    a Chromium for the tests of the page, which are skipped without one"
	@echo "Each installs what it needs into .venv first; TORCH=cpu takes the small CPU-only torch."

demo: sync
	$(RUN) tether demo $(ARGS)

# The example takes PATH's commands: those of this clone
real: sync-real
	PATH="$(CURDIR)/.venv/bin:$$PATH" sh examples/real/run.sh $(ARGS)

test: sync
	$(PYTEST) -m "not slow" $(ARGS)

test-all: sync
	$(PYTEST) $(ARGS)

# What a processor changes, as on one with AVX2 and no more: near such a machine, not the same. Compiled code is kept
# apart, since torch does not ask which instructions it was made for.
CAPPED := ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2
OF_PROCESSORS := tests/language tests/ppo tests/test_semantics.py tests/test_bridge.py tests/test_benchmarks_memory.py \
	tests/pipeline/test_ppo.py tests/pipeline/test_architectures.py tests/pipeline/test_lora.py

test-avx2: sync
	@folder=$$(mktemp -d); trap 'rm -rf "$$folder"' EXIT; export TORCHINDUCTOR_CACHE_DIR=$$folder; \
		$(CAPPED) $(PYTEST) -m "not slow" $(OF_PROCESSORS) $(ARGS)

# One process: the model is large enough for all cores to share one of its products.
test-real: sync-real
	$(RUN) pytest -m real -o faulthandler_timeout=1200 $(ARGS)

# The pictures' packages at the lock file's versions, whichever torch is installed: `uv sync` would replace TORCH=cpu's.
bench: sync
	@$(UV) export --quiet --frozen --no-hashes --only-group benchmarks -o .venv/benchmarks.txt
	@$(UV) pip install --quiet --python .venv -r .venv/benchmarks.txt
	@mkdir -p $(BENCH_FOLDER)
	@failed=; for name in $(BENCHES); do \
		output=$(BENCH_FOLDER)/$$name; \
		case $$name in \
			control) set -- --output $$output.json $(CONTROL_ARGS);; \
			*) set -- --json $$output.json --png $$output.png $(ARGS);; \
		esac; \
		echo "python benchmarks/$$name.py $$*"; \
		$(RUN) python benchmarks/$$name.py "$$@" || failed="$$failed $$name"; \
	done; \
	[ -z "$$failed" ] || { echo "make: benchmarks that failed:$$failed" >&2; exit 1; }

lint: sync
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) mypy

format: sync
	$(RUN) ruff check --fix .
	$(RUN) ruff format .

sync: .venv/.torch

# SmolLM2 and what reads it, at the lock file's versions, beside whichever torch is installed
sync-real: sync
	@$(UV) export --quiet --frozen --no-hashes --only-group real -o .venv/real.txt
	@$(UV) pip install --quiet --python .venv -r .venv/real.txt

browser:
	@sh .ci/browser

# Holds the name of the torch that is installed, and is as new as the last complete installation. Packages that a user
# has added stay. uv downloads everything before it changes anything, so that what fails leaves .venv as it was.
.venv/.torch: pyproject.toml uv.lock $(if $(filter $(TORCH),$(INSTALLED)),,FORCE) | $(filter .uv/bin/uv,$(UV))
	@$(UV) python find --quiet >/dev/null 2>&1 || $(UV) python install --quiet 3.12 2>/dev/null || { \
		echo "make: Tether needs Python 3.11, 3.12 or 3.13: none was found and none could be downloaded;" \
			"install one and run make again" >&2; exit 1; }
ifeq ($(TORCH),cpu)
	@[ -x .venv/bin/python ] || $(UV) venv --quiet --allow-existing .venv
	@$(UV) export --quiet --frozen --no-hashes --no-emit-project --extra control --extra rlhf --prune torch -o .venv/requirements.txt
	@$(UV) export --quiet --frozen --no-hashes --no-emit-project --extra control --extra rlhf --no-emit-package torch -o .venv/constraints.txt
	@echo "installing into .venv, with the CPU-only torch"
	@$(UV) pip install --python .venv --compile-bytecode --torch-backend cpu $(if $(filter cpu,$(INSTALLED)),,--reinstall-package torch) \
		-r .venv/requirements.txt -c .venv/constraints.txt "$(TORCH_SPEC)" -e . \
		|| sh .ci/why-not https://download.pytorch.org/whl/cpu/torch/ \
			"\`make sync TORCH=default\` takes the registry's torch, TORCH_SPEC=path/to/torch.whl one that you have"
	@ours=$$(sed -n 's/^name = "\(\(nvidia\|cuda\)-[^"]*\|triton\)"$$/\1/p' uv.lock); \
		unneeded=$$($(UV) pip freeze --python .venv | sed 's/[= ].*//' | grep -Fx "$$ours" || true); \
		[ -z "$$unneeded" ] || $(UV) pip uninstall --quiet --python .venv $$unneeded
else
	@echo "installing into .venv"
	@$(UV) sync --inexact --frozen --extra control --extra rlhf --compile-bytecode \
		|| sh .ci/why-not $(or $(UV_DEFAULT_INDEX),$(UV_INDEX_URL),https://pypi.org/simple/) \
			"mend the network or its proxy, or name a mirror by UV_DEFAULT_INDEX, and run make again"
endif
	@echo $(TORCH) > $@

.uv/bin/uv:
	@sh .ci/bring-uv .uv $(UV_VERSION)
