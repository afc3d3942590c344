"""The training engine's public API.

    import engine

    model = engine.load_model("path/to/model", quantize="nf4", adapter=None)
    logits = model(input_ids)                               # (B, T) -> (B, T, V)
    loss = model.loss(input_ids, labels)                    # labels unshifted, -100 not trained
    result = engine.train(engine.TrainConfig(model=..., data=..., output_dir=...))

Names are imported when they are first used, so that `engine --help` needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.config.train_config import TrainConfig
    from engine.errors import (
        CheckpointError,
        ConfigError,
        DataError,
        EngineError,
        MemoryPlanError,
    )
    from engine.model_sources.load_model import load_model
    from engine.provenance import __version__
    from engine.verbs.generate import generate_text
    from engine.verbs.train import TrainResult, train

_HOME = {
    "__version__": "engine.provenance",
    "TrainConfig": "engine.config.train_config",
    "EngineError": "engine.errors",
    "ConfigError": "engine.errors",
    "CheckpointError": "engine.errors",
    "DataError": "engine.errors",
    "MemoryPlanError": "engine.errors",
    "train": "engine.verbs.train",
    "TrainResult": "engine.verbs.train",
    "generate_text": "engine.verbs.generate",
    "load_model": "engine.model_sources.load_model",
}

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "EngineError",
    "MemoryPlanError",
    "TrainConfig",
    "TrainResult",
    "__version__",
    "generate_text",
    "load_model",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'engine' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
