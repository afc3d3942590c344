"""Make rows of documents, code and templates; train a tokenizer."""
