"""Choose between a Triton kernel and its torch reference.

A CUDA tensor takes the Triton kernel, a CPU tensor the reference. float64 exists for proofs and
always takes the reference. Two environment variables choose on purpose: `ENGINE_REFERENCE=1` the
reference everywhere, `ENGINE_INTERPRET=1` the Triton kernels on CPU tensors too, through Triton's
interpreter (`TRITON_INTERPRET=1` must then be set before the first import). There is no other
fallback: a Triton kernel that cannot run raises.
"""

from __future__ import annotations

import os

import torch


def use_triton(tensor: torch.Tensor) -> bool:
    """Whether the op that reads `tensor` runs as a Triton kernel."""
    if tensor.dtype == torch.float64 or os.environ.get("ENGINE_REFERENCE") == "1":
        return False
    return tensor.is_cuda or os.environ.get("ENGINE_INTERPRET") == "1"
