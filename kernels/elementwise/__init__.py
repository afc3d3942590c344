"""Norms, rotary embedding, SwiGLU and dropout."""
