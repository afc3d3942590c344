"""Pruning of more than heads: channels of feed-forward parts, and whole layers."""
