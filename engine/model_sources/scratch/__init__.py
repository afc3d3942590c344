"""Models to train from scratch: shapes, first weights and tokenizers."""
