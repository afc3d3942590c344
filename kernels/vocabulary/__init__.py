"""Embeddings and output heads whose rows are divided among ranks."""
