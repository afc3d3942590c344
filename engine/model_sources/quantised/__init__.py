"""Weights that a model's files hold quantised: bitsandbytes, fp8 and compressed-tensors."""
