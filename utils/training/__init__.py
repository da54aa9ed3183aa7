"""The training loop, the output folder, checkpoints, averaged weights (EMA) and optimizers of every run."""
