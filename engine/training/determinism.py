"""Equal bits from equal runs: what --deterministic turns on.

On a CPU equal runs with an equal number of threads give equal bits without it. On a GPU some
libraries add up in the order in which threads arrive. Inside the block torch's deterministic mode
chooses ops that do not, and raises where an op has none; attention takes back ends whose backward
pass repeats its bits, which a trial checks (`kernels.attention.choice`); cuBLAS gets workspaces of
a fixed size. The kernels of this program add up in a fixed order anyway.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from engine.errors import ConfigError

_VARIABLE = "CUBLAS_WORKSPACE_CONFIG"
_REPEATABLE = (":4096:8", ":16:8")
_ABSENT = re.compile(r"^(\S+)[^.]* does not have a deterministic implementation")


@contextmanager
def deterministic(device: torch.device, wanted: bool = True) -> Iterator[None]:
    """Inside the block equal work gives equal bits on `device`, if that is `wanted`.

    Raises `ConfigError` where CUBLAS_WORKSPACE_CONFIG forbids it, and for an op inside the block
    that has no deterministic form, by name.
    """
    if not wanted:
        yield
        return
    if device.type == "cuda":
        # cuBLAS reads it when a process first multiplies on a GPU.
        chosen = os.environ.setdefault(_VARIABLE, _REPEATABLE[0])
        if chosen not in _REPEATABLE:
            raise ConfigError(
                f"{_VARIABLE} is {chosen!r}, with which cuBLAS may add up in another order from "
                f"run to run; --deterministic needs {' or '.join(_REPEATABLE)}. Unset it: "
                f"unset {_VARIABLE}"
            )
    before = torch.are_deterministic_algorithms_enabled()
    warned = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    except RuntimeError as error:
        absent = _ABSENT.match(str(error))
        if absent is None:
            raise
        raise ConfigError(
            f"--deterministic was given, and {absent[1]}, which this run needs on "
            f"{device}, has no deterministic form in torch {torch.__version__}. Leave out "
            "--deterministic, or compute in another type with --dtype or on --device cpu."
        ) from error
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warned)
