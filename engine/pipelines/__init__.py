"""Pipelines: verbs in an order, each done once."""
