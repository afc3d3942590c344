"""Checks that model sources share: configuration, tensor names and shapes, digest."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from engine.errors import CheckpointError, ConfigError, listing, printable
from engine.storage.safe_files import MIB, open_regular
from models.config.model_config import ModelConfig

_LONGEST = 1000


def read_config(raw: dict[str, Any], source: str) -> ModelConfig:
    """`ModelConfig.from_dict`, whose complaint becomes a `ConfigError` that names `source`."""
    try:
        return ModelConfig.from_dict(raw)
    except ValueError as error:
        raise ConfigError(f"{source}: {printable(str(error), _LONGEST)}.") from error


def match_tensors(
    present: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], source: str
) -> None:
    """Raise a `CheckpointError` that lists every missing, surplus or misshapen tensor."""
    missing = [f"{name} {list(expected[name])}" for name in expected if name not in present]
    surplus = [f"{name} {list(present[name])}" for name in present if name not in expected]
    wrong = [
        f"{name} is {list(present[name])}, expected {list(expected[name])}"
        for name in expected
        if name in present and tuple(present[name]) != tuple(expected[name])
    ]
    if missing or surplus or wrong:
        parts = [
            f"{len(items)} {kind}: {listing(items)}"
            for kind, items in (
                ("missing", missing),
                ("not in such a model", surplus),
                ("of the wrong shape", wrong),
            )
            if items
        ]
        raise CheckpointError(
            f"The tensors in {source} are not those of the model its configuration describes. "
            f"{'. '.join(parts)}. The configuration belongs to another model, or files are missing."
        )


def quick_digest(config: Mapping[str, Any], files: Iterable[Path]) -> str:
    """SHA-256 over `config` and, for each file, its name, size, first and last MiB.

    It reads two MiB of a file whatever its size, so it can run at every start: it tells one model,
    or one download, from another, and does not find a flipped bit in the middle.
    """
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for path in files:
        with os.fdopen(open_regular(path), "rb") as handle:
            size = os.fstat(handle.fileno()).st_size
            digest.update(os.fsencode(f"\0{path.name}\0{size}\0"))
            digest.update(handle.read(MIB))
            handle.seek(max(size - MIB, 0))
            digest.update(handle.read(MIB))
    return digest.hexdigest()
