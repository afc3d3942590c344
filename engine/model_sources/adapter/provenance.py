"""base.json: the base that an adapter was trained on, beside the adapter.

It holds the digest of the base's files, how their weights were quantised while the adapter was
trained, and in which type the step was computed. PEFT and other programs pass it over.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from engine.errors import CheckpointError
from engine.storage import durable
from engine.storage.safe_files import read_json_object

BASE_FILE = "base.json"

log = logging.getLogger(__name__)


def write_base(directory: Path, record: dict[str, Any]) -> None:
    """Write `record` beside the adapter in `directory`."""
    durable.write_json(directory / BASE_FILE, record)


def read_base(directory: Path) -> dict[str, Any]:
    """What is known of the base of the adapter in `directory`; empty where nothing is."""
    path = directory / BASE_FILE
    if not path.is_file():
        return {}
    try:
        return read_json_object(path)
    except CheckpointError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}); delete it to go on by the base's name alone."
        ) from error


def base_name(quantization: str | None, double_quant: bool | None = True) -> str:
    """Words for the weights that an adapter is used on, or was trained on."""
    if quantization is None:
        return "the original weights"
    if quantization != "nf4":
        return f"{quantization} weights"
    return "NF4 weights" if double_quant in (True, None) else "NF4 weights with plain scales"


def say_base(directory: Path, used: str, advice: str, digest: str) -> str | None:
    """Say which base is `used`, and warn where the adapter was trained on another.

    `digest` tells the files of that base from others. Returns the base that the adapter was trained
    on; None where it does not say.
    """
    log.info("The adapter is used on %s", used)
    record = read_base(directory)
    if record.get("digest", digest) != digest:
        log.warning(
            "the adapter %s was trained on a base with other files than those of this model, so it "
            "may do worse or nothing sensible: base_model_name_or_path in its adapter_config.json "
            "names that base", directory,
        )  # fmt: skip
    if "quantization" not in record:
        return None
    trained = base_name(record["quantization"], record.get("double_quant"))
    if trained != used:
        log.warning(
            "the adapter was trained on %s and is used on %s, where it may do worse: %s",
            trained, used, advice,
        )  # fmt: skip
    return trained
