"""The verbs about data and this machine."""
