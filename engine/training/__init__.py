"""The training loop and what it needs before it starts."""
