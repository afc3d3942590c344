"""What a loaded model is used for: perplexity of rows, answers to prompts."""
