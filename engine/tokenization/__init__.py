"""Tokenizers, chat templates and loss spans."""
