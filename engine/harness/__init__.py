"""The LM Evaluation Harness over a model of this engine, in process."""
