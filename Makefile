# make demo    compile the shipped small model, verify it, print text
# make test    lint, then every test
# make test-cuda-archs   the CUDA kernels compiled for every architecture, their registers and spills
# make test-gpu   the TensorRT engines on the GPU here; skipped, with the reason, where there is none
# make bench   speed of this machine on the shipped model, beside its roofline
# make wheels  the wheels, into dist/, with auditwheel's verdict
# make lock    resolve the dependencies anew, into requirements/
# Each does all set-up: a virtual environment in .venv/, the native build in build/. Both are kept and reused.
.PHONY: demo test test-cuda-archs test-gpu lint format bench build wheels lock clean
.DELETE_ON_ERROR:

VENV := .venv
BIN := $(VENV)/bin
DEMO := build/demo
NATIVE := $(shell find plugins cmake scripts -type f -not -name '*.pyc') CMakeLists.txt opset/schema.py opset/header.py
CXX_FILES := $(shell find plugins tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

# The environment, in two sizes; the larger one serves for both. Made once, and again when the native sources or what it
# should hold change.
DEMO_READY := $(VENV)/.demo
DEV_READY := $(VENV)/.dev
READY := $(if $(wildcard $(DEV_READY)),$(DEV_READY),$(DEMO_READY))

$(DEMO_READY) $(DEV_READY): pyproject.toml $(wildcard requirements/*.txt) $(NATIVE)
	scripts/bootstrap.sh $(VENV) $(subst .,,$(notdir $@))
	touch $@

build: $(DEV_READY)

demo: $(READY)
	$(BIN)/dfcompile examples/demo/model.pt --target ort-cpu -o $(DEMO) --force
	$(BIN)/dfssm compare $(DEMO) examples/demo/model.pt
	@printf '\nOnce upon a time'
	@$(BIN)/dfssm run $(DEMO) -p "Once upon a time" -n 100 --temperature 0.7 --seed 1

# One thread each: two test processes on two cores are enough.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --durations=15

test-cuda-archs: build
	DFSSM_CUDA_ARCHS=75,80,86,87,89,90,100,120 $(BIN)/python -m pytest -n 2 -rs tests/plugins_trt/test_nvcc.py

test-gpu: build
	$(BIN)/python -m pytest -m gpu -rs tests/gpu

lint: build
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)
	$(BIN)/lint-imports --no-cache
	$(BIN)/mypy

format: build
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

bench: $(READY)
	$(BIN)/dfcompile examples/demo/model.pt --target ort-cpu -o $(DEMO) --force
	$(BIN)/dfssm bench $(DEMO)

wheels: build
	scripts/build_wheels.sh dist $(BIN)/python

lock: build
	$(BIN)/python scripts/lock.py

clean:
	rm -rf build dist .cache .pytest_cache .ruff_cache .mypy_cache $(DEMO_READY) $(DEV_READY)
