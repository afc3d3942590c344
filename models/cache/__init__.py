"""Keys, values and states of tokens that layers have seen, for generation."""
