"""Tokenizers from vocabulary files that are no tokenizer.json, and what repairs one."""
