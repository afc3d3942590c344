"""Sampling settings of a GGUF file, spelled as in generation_config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

_PREFIX = "general.sampling."
_NAMES = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}


def sampling(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What `general.sampling.*` says; llama.cpp draws by it unless told otherwise.

    llama.cpp's converter takes it from generation_config.json, without `do_sample`: a temperature
    above 0 stands for that.
    """
    result: dict[str, Any] = {}
    for key, name in _NAMES.items():
        value = metadata.get(_PREFIX + key)
        if isinstance(value, int | float) and not isinstance(value, bool):
            # Stored in 32 bits: the shortest decimal that rounds to the same.
            result[name] = value if isinstance(value, int) else float(str(np.float32(value)))
    if result.get("temperature", 0) > 0:
        result["do_sample"] = True
    return result
