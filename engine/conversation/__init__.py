"""Conversations with a model: prompts, reasoning, tool calls, and the loop of a chat."""
