"""Choose between a Triton kernel and its torch reference.

A CUDA tensor takes the Triton kernel, a CPU tensor the reference. float64 exists for proofs and
always takes the reference. Two environment variables choose on purpose: `ENGINE_REFERENCE=1` the
reference everywhere, or `ENGINE_REFERENCE=rms_norm,moe` in those modules or folders of `kernels`
alone; `ENGINE_INTERPRET=1` the Triton kernels on CPU tensors too, through Triton's interpreter
(`TRITON_INTERPRET=1` must then be set before the first import). There is no other fallback: a
Triton kernel that cannot run raises.
"""

from __future__ import annotations

import os
import sys
from functools import cache
from pathlib import Path

import torch

_FOLDER = Path(__file__).resolve().parents[1]


def use_triton(tensor: torch.Tensor) -> bool:
    """Whether the op that reads `tensor` runs as a Triton kernel.

    Asked by the op's own module, whose name ENGINE_REFERENCE may hold. Raises `ValueError` where
    it holds a name that no module or folder of `kernels` has.
    """
    if tensor.dtype == torch.float64:
        return False
    reference = os.environ.get("ENGINE_REFERENCE")
    if reference == "1":
        return False
    if reference not in (None, "", "0"):
        caller = str(sys._getframe(1).f_globals["__name__"])
        if not _reference_names(reference).isdisjoint(caller.split(".")):
            return False
    return tensor.is_cuda or os.environ.get("ENGINE_INTERPRET") == "1"


def check_reference() -> None:
    """Raise `ValueError` where ENGINE_REFERENCE names what `kernels` has not."""
    text = os.environ.get("ENGINE_REFERENCE")
    if text not in (None, "", "0", "1"):
        _reference_names(text)


@cache
def _reference_names(text: str) -> frozenset[str]:
    """The names in ENGINE_REFERENCE."""
    names = frozenset(name.strip() for name in text.split(","))
    paths = [path for path in _FOLDER.rglob("*") if path.is_dir() or path.suffix == ".py"]
    known = {path.stem for path in paths if not path.stem.startswith("_")}
    unknown = sorted(names - known)
    if unknown:
        raise ValueError(
            f"ENGINE_REFERENCE names {unknown[0]!r}, which is no module or folder of kernels; "
            "expected 1, or names such as rms_norm, nf4 or moe with commas between them"
        )
    return names
