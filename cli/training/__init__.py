"""The verbs around a run: settings, plan, training, how far it is."""
