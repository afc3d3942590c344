"""The training engine's public API.

    import engine

    model = engine.load_model("path/to/model", quantize="nf4", adapter=None)
    logits = model(input_ids)                               # (B, T) -> (B, T, V)
    loss = model.loss(input_ids, labels)                    # labels unshifted, -100 not trained
    result = engine.train(engine.TrainConfig(model=..., data=..., output_dir=...))
    engine.resume("runs/first")                             # after a stop; settings from the run
    engine.evaluate(model, data, adapter).perplexity
    engine.judge(model, data, adapter, gates={"checker": "json"}).passed
    engine.generate(model, "What does zip() do?", adapter).text
    engine.merge(model, adapter, output)
    engine.quantize(model, output, bits=4)
    engine.prune(model, output, fraction=0.1)
    engine.forge(model=..., data=..., output_dir=..., fraction=0.1, max_steps=100)
    engine.plan(engine.TrainConfig(...)).text()
    engine.serve(model, adapter=["tuned=runs/first"])       # until the process is told to stop
    engine.sweep("sweep.yaml").best                         # several values of some settings
    engine.compare(["runs/a", "runs/b"]).settings()         # what differs, curves, figures
    engine.board(["runs"])                                  # a page in a browser, until Ctrl-C

One function per verb; its keyword arguments are the settings that `engine VERB --help` lists, and a
wrong one raises `ConfigError`. Names are imported when they are first used, so that `engine --help`
needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from engine.runs.startup import let_segments_grow, wait_quietly

if TYPE_CHECKING:
    from engine.config.tasks.pruning import ForgeSettings, PruneSettings
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
    from engine.training.evaluation.callbacks import Callback
    from engine.verbs.models.evaluate import evaluate
    from engine.verbs.models.forge import forge
    from engine.verbs.models.generate import generate
    from engine.verbs.models.judge import judge
    from engine.verbs.models.merge import merge
    from engine.verbs.models.prune import prune
    from engine.verbs.models.quantize import quantize
    from engine.verbs.models.serve import serve
    from engine.verbs.training.board import board
    from engine.verbs.training.compare import compare
    from engine.verbs.training.lr_find import lr_find
    from engine.verbs.training.plan import plan
    from engine.verbs.training.resume import resume
    from engine.verbs.training.sweep import sweep
    from engine.verbs.training.train import TrainResult, train

# Here, because every way into the engine comes by here before torch is imported.
wait_quietly()
let_segments_grow()

_HOME = {
    "__version__": "engine.provenance",
    "TrainConfig": "engine.config.train_config",
    "PruneSettings": "engine.config.tasks.pruning",
    "ForgeSettings": "engine.config.tasks.pruning",
    "EngineError": "engine.errors",
    "ConfigError": "engine.errors",
    "CheckpointError": "engine.errors",
    "DataError": "engine.errors",
    "MemoryPlanError": "engine.errors",
    "load_model": "engine.model_sources.load_model",
    "train": "engine.verbs.training.train",
    "Callback": "engine.training.evaluation.callbacks",
    "TrainResult": "engine.verbs.training.train",
    "resume": "engine.verbs.training.resume",
    "evaluate": "engine.verbs.models.evaluate",
    "judge": "engine.verbs.models.judge",
    "generate": "engine.verbs.models.generate",
    "merge": "engine.verbs.models.merge",
    "prune": "engine.verbs.models.prune",
    "quantize": "engine.verbs.models.quantize",
    "forge": "engine.verbs.models.forge",
    "serve": "engine.verbs.models.serve",
    "lr_find": "engine.verbs.training.lr_find",
    "plan": "engine.verbs.training.plan",
    "board": "engine.verbs.training.board",
    "sweep": "engine.verbs.training.sweep",
    "compare": "engine.verbs.training.compare",
}
_EARLIER = {"generate_text": "generate"}

__all__ = [
    "Callback",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "EngineError",
    "ForgeSettings",
    "MemoryPlanError",
    "PruneSettings",
    "TrainConfig",
    "TrainResult",
    "__version__",
    "board",
    "compare",
    "evaluate",
    "forge",
    "generate",
    "judge",
    "load_model",
    "lr_find",
    "merge",
    "plan",
    "prune",
    "quantize",
    "resume",
    "serve",
    "sweep",
    "train",
]


def __getattr__(name: str) -> Any:
    name = _EARLIER.get(name, name)
    if name not in _HOME:
        raise AttributeError(f"module 'engine' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
