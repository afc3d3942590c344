"""Conversations: prompts, reasoning, tool calls, and the loop of a chat."""
