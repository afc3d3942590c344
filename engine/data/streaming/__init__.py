"""Rows that are read, shuffled and tokenised while training, in little memory."""
