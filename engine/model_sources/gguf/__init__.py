"""GGUF files: container, metadata, tensors and tokenizer."""
