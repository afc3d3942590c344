"""Settings of recipes: adapter, optimizer and schedule of a run, a table each."""
