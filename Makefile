# Needs Python >= 3.10, git and make; everything else is installed into .venv.
PYTHON ?= python3
VENV = .venv
# Which versions to install; constraints-oldest.txt names the oldest that are supported.
CONSTRAINTS ?= constraints.txt
RUN = $(VENV)/bin/python
# How many processes share the tests.
PROCESSES ?= 2
# Threads that wait give up their core: where cores are shared, spinning costs twice the time.
export OMP_WAIT_POLICY ?= passive
INSTALL = -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS)

.PHONY: help demo experiment docs docs-serve test coverage mutants test-deep test-hosts test-wheel format lint wheel release-check bench bench-cuda clean
.NOTPARALLEL:

help:  ## print the commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /:/' | awk -F: '{printf "make %-12s %s\n", $$1, $$2}'

demo: $(VENV)/.examples  ## turn the hue of photographs: train CARE and its two controls, and print how they compare
	$(RUN) docs/examples/photos.py $(ARGS)

experiment: $(VENV)/.experiments  ## run an experiment of docs/experiments: make experiment NAME=theory
	$(RUN) docs/experiments/$(NAME).py $(ARGS)

docs: $(VENV)/.docs  ## build the site into build/docs; warnings are errors
	rm -rf build/docs
	$(RUN) -m sphinx --fail-on-warning --keep-going --quiet docs build/docs
	@echo "open build/docs/index.html"

docs-serve: docs  ## build the site and show it at http://localhost:8000
	$(RUN) -m http.server --directory build/docs --bind localhost

test: $(VENV)/.test  ## run the tests; make test ARGS="-k theorem" runs a part of them
	$(RUN) -m pytest --numprocesses $(PROCESSES) --dist loadgroup $(ARGS)

coverage: $(VENV)/.test  ## run the tests and print which lines they reach; takes up to 40 % more time than make test
	$(RUN) -m pytest --numprocesses $(PROCESSES) --dist loadgroup --cov=care_loss --cov-report=term:skip-covered $(ARGS)

mutants: $(VENV)/.mutants  ## break a module in 40 random ways, and print what no test notices: make mutants MODULE=sphere
	$(RUN) tests/mutants.py $(MODULE) $(ARGS)

# Files that draw examples; of all others, what is marked `deep` and left out by make test.
DRAWN = actions cross_fitted metrics similarity theorems
DEEP = $(DRAWN:%=tests/test_%.py) $(wildcard tests/test_rotation*.py tests/test_sphere*.py)
test-deep: $(VENV)/.test  ## many more examples for every theorem, and the whole of each sweep
	$(RUN) -m pytest $(DEEP) --hypothesis-profile=deep $(ARGS)
	$(RUN) -m pytest -m deep $(DEEP:%=--ignore=%) --hypothesis-profile=deep $(ARGS) \
		|| test $$? = 5  # where ARGS chooses none of them

# What CI does not install. The log is committed: it shows which versions of the hosts were tried.
HOSTS_LOG = docs/hosts/log.txt
test-hosts: $(VENV)/.hosts build/solo-learn  ## run the examples for all other libraries in these, and write a log
	$(RUN) -m pip list --format freeze | grep -iE \
		"^(accelerate|albumentations|hydra-core|jsonargparse|kornia|lightly|lightning|pytorch.*|timm|torch.*|transformers)=" \
		> $(HOSTS_LOG)
	git -C build/solo-learn log -1 --format="solo-learn at commit %h of %as" >> $(HOSTS_LOG)
	$(RUN) -m pytest tests/test_hosts.py --hypothesis-profile=deep --no-header --quiet -rA --show-capture stdout $(ARGS) | tee -a $(HOSTS_LOG)

build/solo-learn:
	git clone --quiet --depth 1 https://github.com/vturrisi/solo-learn $@

format: $(VENV)/.lint  ## format the code and sort imports
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

# What is not asked of the types in tests and benchmarks; functions without annotations are not checked.
LENIENT = arg-type assignment call-overload dict-item index misc operator var-annotated
lint: $(VENV)/.lint  ## check style and types
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(RUN) -m mypy --config-file= --ignore-missing-imports $(LENIENT:%=--disable-error-code %) tests benchmarks
	$(RUN) -m codespell_lib .

release-check: $(RUN)  ## build sdist and wheel, check both, and run the README's first example against each
	rm -rf dist build/release && mkdir -p build/release
	$(RUN) $(INSTALL) build twine cffconvert
	$(RUN) -m build --outdir dist .
	$(RUN) -m twine check --strict dist/*
	$(VENV)/bin/cffconvert --validate
	for file in $(CURDIR)/dist/*.tar.gz $(CURDIR)/dist/*.whl; do \
		rm -rf build/release/venv && $(PYTHON) -m venv build/release/venv \
		&& build/release/venv/bin/python $(INSTALL) $$file \
		&& sed -n '/^```python/,/^```$$/p' README.md | sed '/^```$$/q' | grep -v '^```' > build/release/readme.py \
		&& (cd build/release && venv/bin/python readme.py) || exit 1; done

wheel: $(RUN)  ## build the wheel into dist/
	rm -rf dist
	$(RUN) -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .

# Tests that know nothing of the checkout, against the wheel in an environment of its own.
WHEEL_TESTS = functional autograd theorems modules recipes views errors errors_geometry sphere sphere_paths sphere_mean rotation rotation_group rotation_precision rotation_uniqueness similarity cross_fitted actions actions_so3 metrics report report_errors report_sampling compare monitor distributed distributed_errors distributed_torch
test-wheel: wheel  ## test the wheel in an environment of its own
	rm -rf build/wheel && mkdir -p build/wheel
	cp -r tests pyproject.toml build/wheel
	$(PYTHON) -m venv build/wheel/venv
	build/wheel/venv/bin/python $(INSTALL) dist/*.whl pytest pytest-xdist hypothesis mpmath numpy
	cd build/wheel && venv/bin/python -c "import care_loss; print(care_loss.__file__)" \
		| grep site-packages
	cd build/wheel && venv/bin/python -m pytest --numprocesses $(PROCESSES) --dist loadgroup $(WHEEL_TESTS:%=tests/test_%.py)

bench: $(VENV)/.bench  ## the losses, processes, rotations, actions, measures, the sphere, and where others fail; make bench ARGS=--quick
	$(RUN) benchmarks/operations.py $(ARGS)
	$(RUN) benchmarks/precision.py $(ARGS)
	$(RUN) benchmarks/contrastive.py $(ARGS)
	$(RUN) benchmarks/threads.py $(ARGS)
	$(RUN) benchmarks/memory.py $(ARGS)
	$(RUN) benchmarks/negatives.py $(ARGS)
	$(RUN) benchmarks/equivariance.py $(ARGS)
	$(RUN) benchmarks/care.py $(ARGS)
	$(RUN) benchmarks/rotation_contrast.py $(ARGS)
	$(RUN) benchmarks/step.py $(ARGS)
	$(RUN) benchmarks/chunks.py $(ARGS)
	$(RUN) benchmarks/distributed.py $(ARGS)
	$(RUN) benchmarks/metrics.py $(ARGS)
	$(RUN) benchmarks/monitor.py $(ARGS)
	$(RUN) benchmarks/procrustes.py $(ARGS)
	$(RUN) benchmarks/similarity.py $(ARGS)
	$(RUN) benchmarks/actions.py $(ARGS)
	$(RUN) benchmarks/failures.py
	$(RUN) benchmarks/sphere.py $(ARGS)

# On a machine with a torch of its own: make bench-cuda RUN=python3, and nothing is installed.
bench-cuda: $(if $(filter command,$(firstword $(origin RUN))),,$(VENV)/.test)  ## with a CUDA GPU, in eight minutes: paths, tests, benchmark; results in build/cuda
	$(RUN) benchmarks/cuda_run.py $(ARGS)

clean:  ## remove everything that these commands have made
	rm -rf $(VENV) build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache

# One environment; each command adds the extra of pyproject.toml that it needs, once.
$(VENV)/.%: $(RUN) pyproject.toml $(CONSTRAINTS)
	$(RUN) $(INSTALL) --editable ".[$*]"
	touch $@

$(RUN):
	@$(PYTHON) -c "import sys; sys.exit('care_loss needs Python >= 3.10: make PYTHON=python3.12 ...' \
		if sys.version_info < (3, 10) else 0)"
	$(PYTHON) -m venv $(VENV) || (rm -rf $(VENV); false)
