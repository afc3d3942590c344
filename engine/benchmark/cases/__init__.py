"""The ops that are measured and checked, at the shapes of models."""
