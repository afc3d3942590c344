"""Measuring the ops against this machine's limits and against other ways of computing them."""
