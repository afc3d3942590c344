"""Verbs around a model: judge, use, change and write one."""
