"""Kernels compiled ahead of time, and their machine code counted."""
