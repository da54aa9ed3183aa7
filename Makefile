PYTHON ?= python3
BIN := .venv/bin

.PHONY: help train mnist test lint benchmark clean

help:  ## list the targets
	@grep -E '^[a-z]+: .*##|^[a-z]+:  ##' Makefile | sed -E 's/:[^#]*## /\t/' | expand -t 12

train: .venv/installed  ## install, then train on the embedded digits: pictures in minutes, on a CPU, offline
	$(BIN)/accelerate launch --quiet --config_file accelerate_config.yaml train_ddpm.py \
	  --dataset_name digits --resolution 16 --max_train_steps 2000 --output_dir outputs/digits

mnist: .venv/installed  ## train on MNIST from the Hub, five minutes on 2 CPU cores
	$(BIN)/accelerate launch --quiet --config_file accelerate_config.yaml train_ddpm.py \
	  --dataset_name mnist --max_train_steps 1200 --output_dir outputs/mnist

test: .venv/installed-dev  ## the whole test suite, on a CPU, offline
	$(BIN)/python -m pytest

lint: .venv/installed-dev  ## style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

benchmark: .venv/installed  ## our training step beside a plain one, images/s
	$(BIN)/python benchmarks/throughput.py

clean:  ## remove the environment (not the outputs)
	rm -rf .venv

.venv/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed, $(PYTHON) is older. Try: make PYTHON=python3.12 train"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/installed-dev: requirements-dev.txt .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@
