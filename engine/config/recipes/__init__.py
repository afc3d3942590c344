"""Settings of recipes: adapter, optimizer and schedule, a table each."""
