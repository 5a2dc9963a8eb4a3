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
# apt and pip as on a Debian for ARM that is in a folder, without root
ARM := $(CURDIR)/.venv-arm
ARM_APT := apt-get $(addprefix --option ,APT::Architecture=arm64 APT::Architectures=arm64 Debug::NoLocking=1 \
	Dir::State=$(ARM)/apt Dir::State::status=$(ARM)/apt/status Dir::Cache=$(ARM)/apt)
ARM_PYTHON := qemu-aarch64 -L $(ARM)/system $(ARM)/system/usr/bin/python3
ARM_PIP := $(BIN)/python -m pip install --only-binary :all: --platform manylinux2014_aarch64 \
	$(foreach glibc,17 18 19 20 21 22 23 24 25 26 27 28,--platform manylinux_2_$(glibc)_aarch64)
# the site; ruff formats its signatures
SITE := "mkdocs-material>=9.7" "mkdocstrings-python>=2" ruff
SOON := 2 minutes on a fast line, a quarter of an hour on a slow one

.PHONY: demo test test-oldest slow yolo engines arm docs lint format clean

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

# the compiled kernel on 64-bit ARM, in emulation: on Debian, with g++-aarch64-linux-gnu and qemu-user
arm: $(VENV)/installed .venv-arm/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/test_arm.py -m slow

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

# PyTorch reads the file in proc, and crashes where that is about another kind of processor
.venv-arm/installed: Makefile | $(VENV)/installed
	@echo "$(@D): fetching Debian's Python and PyTorch for ARM with CUDA, about 3 GB, 5 GB on the disk. Once; it takes $(SOON)."
	rm -rf $(@D)
	mkdir -p $(@D)/apt/lists/partial $(@D)/apt/archives/partial $(@D)/system/proc
	touch $(@D)/apt/status
	$(ARM_APT) --quiet update
	$(ARM_APT) --quiet install --yes --download-only --no-install-recommends python3 libstdc++6
	for package in $(@D)/apt/archives/*.deb; do dpkg -x $$package $(@D)/system; done
	printf '%s\n' 'processor: 0' 'Features: fp asimd' 'CPU implementer: 0x41' 'CPU architecture: 8' \
		'CPU variant: 0x3' 'CPU part: 0xd0c' 'CPU revision: 1' > $(@D)/system/proc/cpuinfo
	$(ARM_PIP) --quiet --target $(@D)/packages "torch>=2.12" numpy platformdirs pytest hypothesis \
		--python-version $$($(ARM_PYTHON) -c 'import platform; print(platform.python_version())')
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
