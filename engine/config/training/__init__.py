"""Settings of engine train by subject, and its presets."""
