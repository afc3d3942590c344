"""Settings of a training run: `TrainConfig`, its rules, sources, aliases and presets."""

from engine.config.train_config import TrainConfig

__all__ = ["TrainConfig"]
