"""A benchmark case: one op at one shape, its operations and bytes.

Operations and bytes are the fewest that the op needs: each input read once, each output written
once, nothing recomputed. A share of the roofline is therefore a share of what no version can beat.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kernels.nf4 import NF4Weight

Tensors = Mapping[str, Tensor]
Function = Callable[[Tensors], Tensors]


@dataclass(frozen=True)
class Work:
    """An op on concrete inputs.

    `ours` and `plain` map inputs to named results; `plain` computes in the dtype of what it is
    given. `ours` may overwrite the inputs named in `overwritten`. `quantized` are the NF4 weights
    among the inputs, in bitsandbytes' order, and `parameters` what an optimiser updates: other
    implementations read them.
    """

    tensors: Tensors
    ours: Function
    plain: Function
    overwritten: tuple[str, ...] = ()
    quantized: Mapping[str, NF4Weight] = field(default_factory=dict)
    parameters: Sequence[Tensor] = ()

    def copies(self) -> dict[str, Tensor]:
        """The inputs, those that `ours` overwrites as copies."""
        return {k: v.clone() if k in self.overwritten else v for k, v in self.tensors.items()}


@dataclass(frozen=True)
class Case:
    """One op at one shape. `make` allocates inputs on a device; call it once per measurement."""

    op: str
    model: str
    shape: str
    dtype: torch.dtype
    flops: float
    nbytes: float
    make: Callable[[torch.device], Work]

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def name(self) -> str:
        """Op, model and shape: unique among the cases of one run."""
        return f"{self.op} {self.model} {self.shape} {self.dtype_name}"


@dataclass(frozen=True)
class CaseSizes:
    """What cases are made for: a model's shape, tokens at once, the compute dtype.

    `streamed` are the tokens of ops that memory bounds, where other than `tokens`: on a CPU as many
    as do not fit its caches.
    """

    tokens: int
    dtype: torch.dtype
    rank: int = 16
    document: int = 4096
    head_rows: int = 4096
    optimizer_layers: int | None = None
    streamed: int | None = None

    @property
    def streamed_tokens(self) -> int:
        """Tokens of ops that memory bounds."""
        return self.streamed or self.tokens

    @property
    def bounds(self) -> tuple[int, ...]:
        """Where documents of `document` tokens begin and end."""
        return (*range(0, self.tokens, self.document), self.tokens)


def gradients(outputs: Tensor, inputs: Tensors, cotangent: Tensor | None = None) -> Tensors:
    """d outputs / d inputs, named `d<input>`."""
    input_gradients = torch.autograd.grad(outputs, list(inputs.values()), cotangent)
    return {f"d{name}": grad for name, grad in zip(inputs, input_gradients, strict=True)}


def leaf(tensor: Tensor) -> Tensor:
    """The same values as a leaf that wants a gradient."""
    return tensor.detach().requires_grad_()
