"""Durable files: atomic writes, locks, manifests and checked reads."""
