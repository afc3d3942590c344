"""engine board: runs in a browser, while they train and afterwards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from engine.errors import ConfigError


def board(
    runs: Sequence[Path | str] = ("runs",), port: int = 8765, ready: Callable[[str], None] = print
) -> None:
    """Serve the page of some runs on 127.0.0.1 until Ctrl-C.

    `runs` are run directories or folders of them; `ready` is told the page's address. Raises
    `ConfigError` for folders that are not there, a port that is taken, and missing packages.
    """
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"engine board needs the package {error.name}, which is not installed: "
            "pip install 'engine-trainer[serve]' brings it."
        ) from None
    from engine.monitoring.app import Board
    from engine.monitoring.directories import RunDirectories
    from engine.pages.server import ADDRESS, serve_page
    from engine.serving.server import listen

    directories = RunDirectories([Path(run) for run in runs])
    serve_page(Board(directories, planned_bytes).app(), listen(ADDRESS, port), ready)


def planned_bytes(run: Path) -> int:
    """The memory that the plan of a run needs, in bytes, on a device of its kind.

    It is planned with the run's settings and rows; of a run on a GPU it is the GPU's memory, else
    that of the whole process. Raises `EngineError` where the model or the rows cannot be read.
    """
    from engine.config.sources import build
    from engine.config.train_config import TrainConfig
    from engine.runs.stored import read_settings
    from engine.runs.summary import read_record
    from engine.training.cpu_dtype import with_cpu_dtype
    from engine.verbs.training.plan import find_target

    config = build(TrainConfig, read_settings(run))
    machine = read_record(run / "manifest.json").get("machine")
    if config.device == "auto":
        gpu = isinstance(machine, dict) and bool(machine.get("gpus"))
        config = config.model_copy(update={"device": "cuda" if gpu else "cpu"})
    target = find_target(config)
    return target.plan(with_cpu_dtype(config, target.gpu, target.model)).total
