"""Runs side by side: settings that differ, curves, final figures."""
