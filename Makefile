# make demo    compile the shipped small model, verify it, print text
# make test    lint, then every test
# make test-ray   dfssm serve --ray, with Ray installed into .venv/
# make test-cuda-archs   the CUDA kernels compiled for every architecture, their registers and spills
# make test-gpu   the plugins, and where TensorRT is its engines, on the GPU here; without one, says how to do it elsewhere
# make test-sanitizers   kernels and op library built with AddressSanitizer and UndefinedBehaviorSanitizer: their tests
# make test-file-events   commands killed, and their disk filled, at every change to a file
# make fuzz SECONDS=60   every fuzz entry for so long
# make bench   speed of this machine on models of 130M to 2.7B, beside its roofline and its peers; after make bench-peers
# make bench-peers   install what `dfssm bench --peer llama.cpp` and the plots take: llama.cpp is compiled for this CPU
# make wheels  the wheels, into dist/, with auditwheel's verdict
# make arm     the wheel of dfssm for Linux on Arm, cross-compiled, into dist/
# make jetson  the plugins' wheel for Jetson Orin and Thor, cross-compiled, into dist/
# make release   of the commit that is checked out: wheels, sources, bill of materials, hashes, into dist/release/
# make site    the documentation as web pages, into build/site/
# make lock    resolve the dependencies anew, into requirements/
# Each does all set-up: a virtual environment in .venv/, the native build in build/. Both are kept and reused.
.PHONY: demo test test-ray test-cuda-archs test-gpu test-sanitizers test-file-events fuzz lint format bench bench-peers build wheels arm jetson release site lock clean
.DELETE_ON_ERROR:

VENV := .venv
BIN := $(VENV)/bin
DEMO := build/demo
NATIVE := $(shell find plugins cmake scripts opset -type f -not -name '*.pyc') CMakeLists.txt
CXX_FILES := $(shell find plugins native opset examples tests -name '*.[ch]' -o -name '*.[ch]pp' -o -name '*.cu' -o -name '*.cuh')

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
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --durations=15 -m "not ray"

# Ray is no part of the environment: 130 MB that one option takes.
test-ray: build
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps -r requirements/ray.txt || \
	  echo "test-ray: Ray cannot be installed here, its tests are skipped"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m ray -rs tests/serve

test-cuda-archs: build
	DFSSM_CUDA_ARCHS=75,80,86,87,89,90,100,110,120 $(BIN)/python -m pytest -n 2 -rs tests/plugins_trt/test_nvcc.py

test-gpu: build
	scripts/gpu_check.sh
	$(BIN)/python -m pytest -m gpu -rs tests/gpu

# gcc's: its runtimes are shared libraries, which go before all others into a python that knows nothing of them.
# Not test_any_alignment, which gives floats at odd addresses: kernels.h allows it, C++ does not; nor what compiles anew.
SANITIZE := -O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined,float-cast-overflow
RUNTIMES := $(foreach name,libasan.so libubsan.so libstdc++.so,$$(g++ -print-file-name=$(name)))
test-sanitizers: build
	$(BIN)/cmake -S . -B build/sanitizers -DCMAKE_CXX_COMPILER=g++ -DCMAKE_BUILD_TYPE=None \
	  -DCMAKE_CXX_FLAGS="$(SANITIZE) -fno-sanitize-recover=undefined,float-cast-overflow" \
	  -DDFSSM_PYTHON=ON -DDFSSM_TRT=OFF -DPython_EXECUTABLE=$(abspath $(BIN))/python \
	  -Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir)
	$(BIN)/cmake --build build/sanitizers -j2
	LD_PRELOAD="$(RUNTIMES)" ASAN_OPTIONS=detect_leaks=0 OMP_NUM_THREADS=1 \
	  $(BIN)/python -m pytest -n 2 -p sanitized \
	  -k "not any_alignment and not simulated and not dotprod and not i8mm and not test_arm" tests/plugins

test-file-events: build
	tests/tools/file_events/run.sh $(BIN)/python build/file_events

SECONDS := 60
fuzz: build
	$(BIN)/python tests/fuzz/campaign.py $(SECONDS)

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
	$(BIN)/python -m dfssm.bench.report

# None of it is in the lock: a build of five to ten minutes that only comparisons need.
bench-peers: $(READY)
	CMAKE_ARGS="-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF" $(BIN)/python -m pip install --progress-bar off \
	  llama-cpp-python==0.3.36 gguf==0.19.0 matplotlib==3.11.2

wheels: build
	scripts/build_wheels.sh dist $(BIN)/python

arm: build
	scripts/build_arm.sh dist $(BIN)/python

jetson: build
	scripts/build_jetson.sh dist $(BIN)/python

release: build
	scripts/release.sh dist/release $(BIN)/python

site: build
	$(BIN)/sphinx-build -q -W --keep-going -c docs . build/site
	@echo build/site/index.html

lock: build
	$(BIN)/python scripts/lock.py

clean:
	rm -rf build dist .cache .pytest_cache .ruff_cache .mypy_cache $(DEMO_READY) $(DEV_READY)
