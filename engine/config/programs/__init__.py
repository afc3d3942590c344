"""Configurations of other training programs, translated into settings of `TrainConfig`."""
