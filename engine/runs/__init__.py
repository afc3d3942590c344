"""The directory of a run: checkpoints, logs, metrics and signals."""
