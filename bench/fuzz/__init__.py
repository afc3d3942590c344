"""Fuzzing that goes on: each reader of strangers' bytes, guided by coverage."""
