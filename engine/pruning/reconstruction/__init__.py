"""Errors that removal makes, layer by layer, and their repair."""
