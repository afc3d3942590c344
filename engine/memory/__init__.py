"""Memory: measured, planned and kept within a budget."""
