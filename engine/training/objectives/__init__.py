"""What a step minimises: losses of tokens, and losses of whole answers."""
