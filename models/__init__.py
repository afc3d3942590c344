"""The graph: decoder, layers, families and adapters."""
