"""Memory: measured, planned and held to a budget."""
