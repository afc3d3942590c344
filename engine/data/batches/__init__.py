"""Which examples form which batch, and the batches themselves."""
