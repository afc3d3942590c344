"""The adapter of a run: its modules, its start and its files."""
