# Every target makes what it needs: on a machine with only Python (>= 3.11), `make demo` and `make test` do it all.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A CUDA torch: make setup TORCH="torch==2.13.0 --index-url <the wheel index for your CUDA>"
TORCH ?= torch==2.13.0

.PHONY: setup peers demo test test-slow soak lint format clean

$(VENV)/.setup-done: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed, this is " + sys.version)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	# torch first: what comes after then keeps this build in place of fetching another one.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo,dev]'
	touch $@

setup: $(VENV)/.setup-done

# The peers of `symile-dist benchmark data` that cannot stand in .venv: without torchvision, with .venv's torch.
.peers/.setup-done: $(VENV)/.setup-done tools/peers/requirements.txt tools/peers/environment.py
	test -x .peers/bin/python || $(BIN)/python -m venv .peers
	.peers/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r tools/peers/requirements.txt
	$(BIN)/python tools/peers/environment.py .peers/bin/python
	touch $@

peers: .peers/.setup-done

demo: setup
	$(BIN)/symile-dist demo --out runs/demo

# Two at a time; a file's tests stay together, and share what is costly to start.
test: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: setup
	$(BIN)/python -m pytest -m slow

# Long runs, under chaos and healthy, about 35 minutes: what it tells is written down in docs/reliability.md.
soak: setup
	$(BIN)/python -m pytest -m soak -s

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
