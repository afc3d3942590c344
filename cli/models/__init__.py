"""The verbs that take a model and use it or write another."""
