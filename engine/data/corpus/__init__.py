"""Make corpora: convert, split, deduplicate, mix, and rows from documents and code."""
