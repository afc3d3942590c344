"""Gates: judge a model by its answers, and decide whether it passes."""
