"""Sweeps: runs of one training with several values of its settings."""
