"""Settings of every verb but train: one table each.

Python, YAML files, `key=value` words, flags and help all read these tables. Nothing here imports
torch, so the command line can show help and report a bad option at once.
"""
