"""Several processes that train together, over torch.distributed."""
