"""What a check is told, and what it finds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from engine.device import resolve_dtype
from kernels.runtime.device import free_memory

Finding = dict[str, Any]
"""`passed` (True, False, or None for not run), `detail` in words, and further figures."""


@dataclass(frozen=True)
class CheckOptions:
    """Where checks run. `small` leaves out the sizes of real models.

    `dtypes` begins with the type that a run would compute in. With `interpret` Triton's kernels run
    in its interpreter, on the CPU.
    """

    device: torch.device
    dtypes: tuple[torch.dtype, ...]
    interpret: bool

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> CheckOptions:
        """From what a process was given as JSON: `device` and `interpret`."""
        device = torch.device(plain["device"])
        if plain["interpret"]:
            # The interpreter multiplies bfloat16 wrongly, so fp32 stands for all types.
            return cls(device, (torch.float32,), True)
        return cls(device, (resolve_dtype("auto", device), torch.float32), False)

    @property
    def small(self) -> bool:
        return self.interpret

    def free_memory(self) -> int:
        """Bytes that a check may take on the device."""
        return free_memory(self.device) if self.device.type == "cuda" else 1 << 30


def passed(detail: str, figures: Any = None) -> Finding:
    """The check is fulfilled."""
    return {"passed": True, "detail": detail, "figures": figures}


def failed(detail: str, figures: Any = None) -> Finding:
    """The check is not fulfilled; `detail` says by what."""
    return {"passed": False, "detail": detail, "figures": figures}


def not_run(reason: str) -> Finding:
    """Nothing was found out, and why."""
    return {"passed": None, "detail": reason, "figures": None}
