"""One training step simulated on tensors without memory."""
