"""Runs on several GPUs and machines, planned: memory, bytes sent, time."""
