PYTHON ?= python3
BIN := .venv/bin

.PHONY: help train mnist faces conditional paired latent few-steps test test-slow test-all lint benchmark clean

help:  ## list the targets
	@grep -E '^[a-z-]+: .*##' Makefile | sed -E 's/:[^#]*## /\t/' | expand -t 12

train: .venv/installed  ## install, then train on the embedded digits, offline: pictures in minutes on a CPU
	$(BIN)/accelerate launch --quiet --config_file accelerate_config.yaml train_ddpm.py \
	  --dataset_name digits --resolution 16 --max_train_steps 1500 --output_dir outputs/digits

mnist: .venv/installed  ## train on MNIST from the Hub, for five minutes on 2 CPU cores
	$(BIN)/accelerate launch --quiet --config_file accelerate_config.yaml train_ddpm.py \
	  --dataset_name mnist --max_train_steps 1500 --autoguidance 0.45 --output_dir outputs/mnist

faces: .venv/installed  ## train on the embedded faces, then adapt the model to pencil drawings of 30 of them
	$(BIN)/accelerate launch --quiet --config_file accelerate_config.yaml train_ddpm.py \
	  --dataset_name faces --resolution 24 --random_flip --max_train_steps 1200 --output_dir outputs/faces-base
	$(BIN)/python benchmarks/sketches.py outputs/sketches
	$(BIN)/accelerate launch --quiet --config_file accelerate_config.yaml finetune_faces.py \
	  --pretrained_model_name_or_path outputs/faces-base --output_dir outputs/faces \
	  --train_data_dir outputs/sketches --validation_split test --random_flip \
	  --prior_dataset_name faces --train_batch_size 16 --max_train_steps 300

conditional: .venv/installed  ## train on the embedded digits with classes: pictures with a row for each digit, in minutes
	$(BIN)/accelerate launch --quiet --config_file accelerate_config.yaml train_conditional.py \
	  --dataset_name digits --resolution 16 --max_train_steps 2000 --output_dir outputs/conditional

paired: .venv/installed  ## train on the embedded digits to enlarge 4 x 4 pixels to 16 x 16, with several samples of each
	$(BIN)/accelerate launch --quiet --config_file accelerate_config.yaml train_paired.py \
	  --dataset_name digits --dataset_split "train[:1500]" --validation_split "train[1500:]" \
	  --resolution 16 --max_train_steps 600 --output_dir outputs/paired

latent: .venv/installed  ## train an autoencoder of the embedded digits, and a model of its latents, with classes
	$(BIN)/accelerate launch --quiet --config_file accelerate_config.yaml train_autoencoder.py \
	  --dataset_name digits --dataset_split "train[:1500]" --validation_split "train[1500:]" \
	  --resolution 32 --max_train_steps 600 --output_dir outputs/autoencoder
	$(BIN)/accelerate launch --quiet --config_file accelerate_config.yaml train_latent.py \
	  --dataset_name digits --dataset_split "train[:1500]" --validation_split "train[1500:]" \
	  --resolution 32 --class_conditional --num_samples 80 --max_train_steps 1500 --output_dir outputs/latent

few-steps: .venv/installed outputs/digits/model_index.json  ## distil the model of `make train` to two sampling steps instead of 25
	$(BIN)/accelerate launch --quiet --config_file accelerate_config.yaml distill_few_steps.py \
	  --pretrained_model_name_or_path outputs/digits --dataset_name digits --resolution 16 \
	  --max_train_steps 300 --output_dir outputs/few-steps

outputs/digits/model_index.json:
	$(MAKE) train

test: .venv/installed-dev  ## run the tests, on a CPU, offline
	$(BIN)/python -m pytest

test-slow: .venv/installed-slow  ## run the slow tests: more faults, launchers and signals
	$(BIN)/python -m pytest -m slow

test-all: test test-slow  ## run all tests

lint: .venv/installed-dev  ## check style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

benchmark: .venv/installed  ## compare the images/s of our training step and of a plain one
	$(BIN)/python benchmarks/throughput.py

clean:  ## remove the environment (not the outputs)
	rm -rf .venv

.venv/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed, but $(PYTHON) is older. Try: make PYTHON=python3.12 train"; exit 1; }
	$(PYTHON) -m venv .venv
	@echo "Installing the packages. On Linux, torch comes with CUDA, a download of several GB (without it: see README)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/installed-dev: requirements-dev.txt .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

.venv/installed-slow: requirements-slow.txt requirements-demo.txt .venv/installed-dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-slow.txt
	touch $@
