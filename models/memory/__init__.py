"""Run the same step in less memory or with fewer launches."""
