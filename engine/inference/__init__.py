"""Perplexity and generated text of a loaded model."""
