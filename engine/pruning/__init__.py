"""Pruning attention heads: scores, selection, removal and report."""
