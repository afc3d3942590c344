"""Dispatch, Triton, scratch memory, random numbers and host memory: what every kernel stands on."""
