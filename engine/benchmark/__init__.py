"""Measure ops against this machine's limits and other implementations."""
