"""One budget, in parameters or milliseconds, for all parts of a model."""
