# Two commands: `make demo` and `make test`. Each sets up what is missing first, once.
VENV ?= .venv
PYTHON_BIN := $(VENV)/bin/python
ARGS ?=

.PHONY: demo libero test test-slow bench-gpu chaos chaos-replay chaos-loop lint setup setup-dev setup-libero clean

demo: setup
	$(PYTHON_BIN) -m cosmos_ray demo $(ARGS)

libero: setup-libero
	$(PYTHON_BIN) -m cosmos_ray demo --recipe libero --name libero $(ARGS)
	$(PYTHON_BIN) -m cosmos_ray evaluate --name libero --suite libero_object --tasks 0,1 --trials 10 --seeds 195 --video

test: setup-dev lint
	OMP_NUM_THREADS=1 $(PYTHON_BIN) -m pytest -m "not slow" -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

test-slow: setup-dev
	OMP_NUM_THREADS=1 $(PYTHON_BIN) -m pytest -m slow $(ARGS)

bench-gpu: setup-dev
	$(PYTHON_BIN) jobs/bench/gpu.py --json gpu.json --page gpu.md $(ARGS)

chaos-replay: setup-dev
	OMP_NUM_THREADS=1 $(PYTHON_BIN) jobs/chaos/replay.py $(ARGS)

chaos: setup-dev
	OMP_NUM_THREADS=1 $(PYTHON_BIN) jobs/chaos/schedule.py $(ARGS)

chaos-loop: setup-dev
	OMP_NUM_THREADS=1 $(PYTHON_BIN) jobs/chaos/loop.py $(ARGS)

lint: setup-dev
	$(PYTHON_BIN) -m ruff check cosmos_ray jobs tests
	$(PYTHON_BIN) -m mypy

setup:
	@cluster/setup.sh $(VENV) serve

setup-libero:
	@cluster/setup.sh $(VENV) libero

setup-dev:
	@cluster/setup.sh $(VENV) dev

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .mypy_cache
