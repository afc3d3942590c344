"""Measurements: one script per op and per whole step, and the demonstration."""
