"""Tokenizers of models and adapters, and tokens that are added to them."""
