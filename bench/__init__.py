"""Measurements; README.md says which command answers which question."""

# Before torch: see engine.runs.startup.wait_quietly.
import engine as engine
