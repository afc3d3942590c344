"""Evaluations while a run trains, and what becomes of them."""
