"""Prune, fine-tune, prove it: cycles of head pruning and recovery, with a baseline."""
