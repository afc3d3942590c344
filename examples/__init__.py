"""Programs and settings to copy."""
