"""Pictures with matplotlib, which is an optional package."""

from __future__ import annotations

import io
import logging
from pathlib import Path
from typing import Any

from engine.errors import CheckpointError
from engine.storage import durable
from engine.storage.standing import refuse_foreign, starts_with

log = logging.getLogger(__name__)

_MAKER = "engine-trainer"
"""What a picture names as the program that made it."""


def refuse_foreign_picture(target: Path) -> None:
    """Raise `ConfigError` where a file stands that is no picture of ours."""
    marks = b"\x89PNG", b"Software\0" + _MAKER.encode()
    refuse_foreign(target, lambda path: starts_with(path, *marks), "a picture")


def new_figure(title: str, width: float, height: float) -> Any | None:
    """An empty figure of this size in inches; None, and a line in the log, without matplotlib.

    The figure is drawn without a display. `title` names the picture in the log line.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        log.info("No %s: matplotlib is not installed (pip install 'engine-trainer[plot]').", title)
        return None
    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Any, target: Path, dots_per_inch: int = 120) -> None:
    """Write the figure as a PNG file, whatever the name's ending. Raises `CheckpointError`."""
    picture = io.BytesIO()
    try:
        figure.savefig(picture, dpi=dots_per_inch, format="png", metadata={"Software": _MAKER})
    except (OSError, RuntimeError) as error:  # a font or a setting that cannot be read
        told = durable.describe(error) if isinstance(error, OSError) else str(error)
        raise CheckpointError(
            f"Cannot draw {durable.final_name(target)}: matplotlib failed with {told}. Reinstall "
            "it, or leave it out: without it there are no pictures, and everything else works."
        ) from error
    durable.write_bytes(target, picture.getvalue())
