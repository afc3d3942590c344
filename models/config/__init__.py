"""The configuration of a model, read from config.json."""
