"""Processes that train together: their rows, their optimizer, their decisions."""
