"""Slices of a batch's tokens and shares of its heads, over ranks."""
