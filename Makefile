# Two commands on a fresh machine (python3 and make): `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test slow yolo lint format clean

demo: $(VENV)/installed
	$(BIN)/python examples/demo.py --out demo

# one thread a worker: threads that outnumber the cores wait for each other
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --durations 10

# ultralytics is AGPL, and its thop takes the place of the plain one
yolo: .venv-yolo/installed
	OMP_NUM_THREADS=1 .venv-yolo/bin/python -m pytest tests/test_yolo.py tests/test_counters.py -m "slow or not slow"

slow: $(VENV)/installed
	$(BIN)/python -m pytest -m slow --durations 0

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# torch and torchvision belong together: one resolution, nothing pinned to a local build
$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

.venv-yolo/installed: pyproject.toml
	$(PYTHON) -m venv .venv-yolo
	.venv-yolo/bin/python -m pip install --quiet --upgrade pip
	.venv-yolo/bin/python -m pip install --quiet --editable ".[train,export]" hypothesis pytest "ultralytics>=8.4"
	touch $@

clean:
	rm -rf $(VENV) .venv-yolo demo dist build
