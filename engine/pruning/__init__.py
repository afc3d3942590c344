"""Pruning attention heads: score them, choose, remove, and say what was done."""
