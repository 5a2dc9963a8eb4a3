# Two commands on a fresh machine (python3 and make): `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
# where venv puts programs
PROGRAMS := $(if $(filter Windows_NT,$(OS)),Scripts,bin)
BIN := $(VENV)/$(PROGRAMS)

# the oldest PyTorch that pyproject.toml allows, with the torchvision that belongs to it
OLDEST := torch==2.12.0 torchvision==0.27.0
# Core ML's converter knows the engine itself on Apple's systems alone
ENGINES := coremltools litert-torch ncnn pnnx torchao
# the site; ruff formats its signatures
SITE := "mkdocs-material>=9.7" "mkdocstrings-python>=2" ruff
SOON := 2 minutes on a fast line, a quarter of an hour on a slow one

.PHONY: demo test test-oldest slow yolo engines docs lint format clean

demo: $(VENV)/installed
	$(BIN)/python examples/demo.py --out demo

# one thread a worker: threads that outnumber the cores wait for each other
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --durations 10

# ultralytics is AGPL, and its thop takes the place of the plain one
yolo: .venv-yolo/installed
	OMP_NUM_THREADS=1 .venv-yolo/$(PROGRAMS)/python -m pytest tests/test_yolo.py tests/test_counters.py -m "slow or not slow"

# what they bring along (JAX, TensorFlow's converter) is large and holds older packages than ours
engines: .venv-engines/installed
	OMP_NUM_THREADS=1 .venv-engines/$(PROGRAMS)/python -m pytest tests/test_engines.py -m slow

# what is compiled and exported depends most on PyTorch
test-oldest: .venv-oldest/installed
	OMP_NUM_THREADS=1 .venv-oldest/$(PROGRAMS)/python -m pytest tests/test_layers.py tests/test_export.py tests/test_tracing.py

slow: $(VENV)/installed
	$(BIN)/python -m pytest -m slow --durations 0

# docstrings are read, not imported: no PyTorch. --strict: a link that leads nowhere is an error
docs: .venv-docs/installed
	.venv-docs/$(PROGRAMS)/mkdocs build --strict
	@echo "site/index.html is there; its search wants a server: python3 -m http.server -d site"

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# torch and torchvision belong together: one resolution, nothing pinned to a local build
$(VENV)/installed: pyproject.toml
	@echo "$(VENV): fetching PyTorch with CUDA and the packages of all tests, about 3 GB, 7 GB on the disk."
	@echo "Once; it takes $(SOON)."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --editable ".[dev]"
	touch $@

.venv-yolo/installed: pyproject.toml
	@echo "$(@D): fetching PyTorch with CUDA and ultralytics, about 3 GB, 6 GB on the disk. Once; it takes $(SOON)."
	$(PYTHON) -m venv $(@D)
	$(@D)/$(PROGRAMS)/python -m pip install --quiet --upgrade pip
	$(@D)/$(PROGRAMS)/python -m pip install --editable ".[train,export]" hypothesis pytest "ultralytics>=8.4"
	touch $@

.venv-engines/installed: pyproject.toml Makefile
	@echo "$(@D): fetching PyTorch with CUDA and engines, about 4 GB, 8 GB on the disk. Once; it takes $(SOON)."
	$(PYTHON) -m venv $(@D)
	$(@D)/$(PROGRAMS)/python -m pip install --quiet --upgrade pip
	$(@D)/$(PROGRAMS)/python -m pip install --editable ".[train]" pytest $(ENGINES)
	touch $@

.venv-oldest/installed: pyproject.toml Makefile
	@echo "$(@D): fetching $(OLDEST) with CUDA, about 3 GB, 6 GB on the disk. Once; it takes $(SOON)."
	$(PYTHON) -m venv $(@D)
	$(@D)/$(PROGRAMS)/python -m pip install --quiet --upgrade pip
	$(@D)/$(PROGRAMS)/python -m pip install --editable ".[train,export]" hypothesis pytest $(OLDEST)
	touch $@

.venv-docs/installed: Makefile
	@echo "$(@D): fetching MkDocs, about 40 MB, 190 MB on the disk. Once; it takes half a minute."
	$(PYTHON) -m venv $(@D)
	$(@D)/$(PROGRAMS)/python -m pip install --quiet --upgrade pip
	$(@D)/$(PROGRAMS)/python -m pip install $(SITE)
	touch $@

clean:
	rm -rf $(VENV) .venv-yolo .venv-engines .venv-oldest .venv-docs demo dist build site
