"""What every run needs, whatever it trains: the loop, the output folder, checkpoints, the averaged weights, the optimizer."""
