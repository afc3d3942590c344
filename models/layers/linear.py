"""Linear, RMSNorm and Embedding: parameters only; the maths lives in `kernels`.

`Linear` has Hugging Face's parameter names. Its weight is a dense `Parameter` or quantised,
and it may carry a LoRA pair; `projection()` is the view of all that which the kernels take.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from kernels.elementwise.rms_norm import (
    add_rms_norm_forward,
    rms_norm,
    rms_norm_backward,
    rms_norm_forward,
)
from kernels.few_rows.elementwise import norm_rows, takes_width
from kernels.few_rows.product import takes_rows
from kernels.linear.adapters import Gradients
from kernels.linear.columns import Columns, gradient_columns, input_columns
from kernels.linear.int8 import Int8Weight, rows_int8
from kernels.linear.projection import LastingWeights, Projection, Weight
from kernels.linear.row_adapters import RowAdapter
from kernels.runtime.dispatch import use_triton
from kernels.runtime.host_memory import gather_rows
from kernels.runtime.ranks import Ranks
from kernels.vocabulary.lookup import lookup
from kernels.vocabulary.shard import VocabularyShard


@dataclass(frozen=True, eq=False)
class RowGroups:
    """Which rows of a pass each named adapter is computed for: indices (n,), None for all.

    Rows that no name has are the model's alone.
    """

    rows: Mapping[str, Tensor | None]
    tokens: int

    def mask(self, name: str, device: torch.device) -> Tensor:
        """The rows of an adapter as marks (N,)."""
        rows = self.rows[name]
        if rows is None:
            return torch.ones(self.tokens, dtype=torch.bool, device=device)
        return torch.zeros(self.tokens, dtype=torch.bool, device=device).index_fill_(0, rows, True)


class Linear(nn.Module):
    """y = x W^T + b + scale * dropout(x) A^T B^T; `kernels.linear.dora` where it has a magnitude.

    weight (out, in); bias (out,) or None; lora_A (r, in) and lora_B (out, r) or None;
    lora_magnitude_vector (out,) or None. `named` are pairs of adapters that a pass chooses by row.
    """

    weight: Weight
    bias: nn.Parameter | None
    lora_A: nn.Parameter | None
    lora_B: nn.Parameter | None
    lora_magnitude_vector: nn.Parameter | None

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.register_parameter("bias", nn.Parameter(torch.empty(out_features)) if bias else None)
        self.register_parameter("lora_A", None)
        self.register_parameter("lora_B", None)
        self.register_parameter("lora_magnitude_vector", None)
        self.scale = 1.0
        self.dropout = 0.0
        self.lasting: LastingWeights | None = None
        self.named: dict[str, RowAdapter] = {}

    def set_weight(self, weight: Weight) -> None:
        """Replace the weight; a quantised one is frozen and no `Parameter`.

        Raises `ValueError` on a shape other than (out_features, in_features).
        """
        if tuple(weight.shape) != (self.out_features, self.in_features):
            raise ValueError(
                f"weight has shape {tuple(weight.shape)}; "
                f"expected {(self.out_features, self.in_features)}"
            )
        self._parameters.pop("weight", None)
        self.lasting = None
        for name in ("weight", "_known"):  # the memory of the old one is to be freed
            self.__dict__.pop(name, None)
        if isinstance(weight, Tensor):
            self.register_parameter("weight", nn.Parameter(weight, requires_grad=False))
        else:
            self.__dict__["weight"] = weight

    def keep_rows(self, rows: slice) -> None:
        """Keep these rows alone."""
        weight, self.out_features = self.weight, rows.stop - rows.start
        trained = isinstance(weight, Tensor) and weight.requires_grad
        assert isinstance(weight, Tensor | Int8Weight) and self.bias is None
        self.set_weight(rows_of(weight, rows))
        if trained:
            self.requires_grad_(True)

    def projection(self, groups: RowGroups | None = None) -> Projection:
        """What `kernels.linear.lora` computes with; shares memory with this module.

        The same object as before while the module has the same tensors and numbers. With `groups`
        it has the named pairs of their rows.
        """
        known = self._projection()
        if groups is None or not self.named:
            return known
        pairs = [
            replace(pair, rows=groups.rows[name])
            for name, pair in self.named.items()
            if name in groups.rows
        ]
        return replace(known, by_rows=tuple(pairs)) if pairs else known

    def _projection(self) -> Projection:
        own, parameters = self.__dict__, self._parameters
        weight = parameters.get("weight")
        if weight is None:
            weight = own["weight"]
        bias, magnitude = parameters["bias"], parameters["lora_magnitude_vector"]
        a, b, scale, dropout = parameters["lora_A"], parameters["lora_B"], self.scale, self.dropout
        lasting = self.lasting
        known: Projection | None = own.get("_known")
        if (
            known is None
            or known.weight is not weight
            or known.bias is not bias
            or known.lora_a is not a
            or known.lora_b is not b
            or known.scale != scale
            or known.dropout != dropout
            or known.magnitude is not magnitude
            or known.lasting is not lasting
        ):
            known = own["_known"] = Projection(
                weight, bias, a, b, scale, dropout, magnitude, lasting
            )
        return known

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Linear:
        super()._apply(fn, recurse)
        weight = self.__dict__.get("weight")
        if weight is not None:
            self.__dict__["weight"] = weight.to(fn(torch.empty(0, device=weight.device)).device)
            self.lasting = None
        return self

    def extra_repr(self) -> str:
        weight = self.weight
        kind = str(weight.dtype) if isinstance(weight, Tensor) else type(weight).__name__
        rank = 0 if self.lora_A is None else self.lora_A.shape[0]
        return f"{self.in_features} -> {self.out_features}, {kind}, rank={rank}"


class RMSNorm(nn.Module):
    """Holds the weight (H,) and eps of one norm; the factor is 1 + w where it is zero-centred."""

    def __init__(self, size: int, eps: float, zero_centered: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps, self.zero_centered = eps, zero_centered

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps, zero_centered=self.zero_centered)

    def forward_with_rstd(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (..., H) -> y (..., H) and rstd (..., 1), which `backward` takes."""
        return rms_norm_forward(x, self.weight, self.eps, zero_centered=self.zero_centered)

    def next_tokens(self, x: Tensor, addend: Tensor | None = None) -> Tensor:
        """y (N, H) without gradients; with an `addend` norm(x + addend), and the sum in it."""
        eps, centred = self.eps, self.zero_centered
        if takes_rows(x) and takes_width(x.shape[1]) and self.weight.dtype == x.dtype:
            return norm_rows(x, self.weight, eps, zero_centered=centred, addend=addend)
        if addend is None:
            return self.forward_with_rstd(x)[0]
        return add_rms_norm_forward(
            x, addend, self.weight, eps, zero_centered=centred, total=addend
        )[0]

    def forward_for(
        self, x: Tensor, group: Sequence[Projection]
    ) -> tuple[Tensor | Columns, Tensor]:
        """y (N, H) and rstd (N, 1) for projections that read y: with columns for their adapters."""
        own = input_columns(x, group)
        if own is None:
            return self.forward_with_rstd(x)
        _, rstd = rms_norm_forward(
            x, self.weight, self.eps, zero_centered=self.zero_centered, out=own.matrix
        )
        return own, rstd

    def add_forward_for(
        self, x: Tensor, addend: Tensor, group: Sequence[Projection]
    ) -> Tensor | Columns:
        """norm(x + addend) (N, H) as `forward_for` gives it; the sum is left in `addend`."""
        own = input_columns(x, group)
        y, _, _ = add_rms_norm_forward(
            x,
            addend,
            self.weight,
            self.eps,
            zero_centered=self.zero_centered,
            out=None if own is None else own.matrix,
            total=addend,
        )
        return y if own is None else own

    def backward(
        self,
        dy: Tensor,
        x: Tensor,
        rstd: Tensor,
        grads: Gradients,
        *,
        dresidual: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """dy (..., H) -> dx (..., H), with the residual's gradient added where there is one.

        Adds the weight's gradient to `grads` if it is wanted. dx lies in `out` if that is given,
        which may be dy, x or dresidual.
        """
        dx, dweight = rms_norm_backward(
            dy,
            x,
            self.weight,
            rstd,
            need_dweight=self.weight.requires_grad,
            zero_centered=self.zero_centered,
            dresidual=dresidual,
            out=out,
        )
        if dweight is not None:
            grads[id(self.weight)] = dweight
        return dx

    def backward_for(
        self,
        dy: Tensor,
        x: Tensor,
        rstd: Tensor,
        grads: Gradients,
        dresidual: Tensor,
        group: Sequence[Projection],
    ) -> Tensor | Columns:
        """dx (N, H) as `backward` gives it, for projections whose outputs' gradient it is.

        Without any it may lie in the memory of dy.
        """
        own = gradient_columns(dy, group)
        if own is None:
            # Triton reads a row before it writes one; torch has a result of its own anyway.
            out = dy if use_triton(dy) else None
            return self.backward(dy, x, rstd, grads, dresidual=dresidual, out=out)
        self.backward(dy, x, rstd, grads, dresidual=dresidual, out=own.matrix)
        return own


def rows_of(weight: Tensor | Int8Weight, rows: slice) -> Tensor | Int8Weight:
    """A copy of some rows of a matrix, dense or in 8-bit rows."""
    if isinstance(weight, Tensor):
        return weight.detach()[rows].clone()
    return Int8Weight(weight.codes[rows].clone(), weight.absmax[rows].clone(), weight.dtype)


class Embedding(nn.Module):
    """Holds the embedding matrix (V, H): a `Parameter`, or frozen as 8-bit rows or on the host."""

    weight: Tensor | Int8Weight

    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.shape = (vocab_size, hidden_size)
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))
        self.device: torch.device | None = None
        self._ranks: tuple[Ranks, int] | None = None

    def keep_rows(self, rows: slice, ranks: Ranks) -> None:
        """Keep these rows, of which each of `ranks` has its own (`kernels.vocabulary`).

        Raises `ValueError` for a matrix on the host.
        """
        if self.device is not None:
            raise ValueError("an embedding on the host is not divided among ranks: it is no GPU's")
        weight, (vocab_size, width) = self.weight, self.shape
        trained = isinstance(weight, Tensor) and weight.requires_grad
        self.shape = (rows.stop - rows.start, width)
        self._ranks = (ranks, vocab_size)
        self.set_weight(rows_of(weight, rows))
        self.requires_grad_(trained)

    def set_weight(self, weight: Tensor | Int8Weight, device: torch.device | None = None) -> None:
        """Replace the matrix by a frozen one.

        With a `device`, `weight` is a dense matrix that stays in the host's memory, and the rows
        that a batch asks for are sent to `device`. Raises `ValueError` on another shape.
        """
        if tuple(weight.shape) != self.shape:
            raise ValueError(
                f"embedding has shape {tuple(weight.shape)}; expected {tuple(self.shape)}"
            )
        self._parameters.pop("weight", None)
        self.__dict__.pop("weight", None)
        self.device = device
        if isinstance(weight, Tensor) and device is None:
            self.register_parameter("weight", nn.Parameter(weight, requires_grad=False))
        else:
            self.__dict__["weight"] = weight

    def forward(self, input_ids: Tensor) -> Tensor:
        """Ids (N,) -> rows (N, H)."""
        if self._ranks is not None:
            ranks, vocab_size = self._ranks
            return lookup(VocabularyShard(self.weight, vocab_size, ranks), input_ids)
        if isinstance(self.weight, Int8Weight):
            return rows_int8(self.weight, input_ids)
        if self.device is not None:
            return gather_rows(self.weight, input_ids, self.device)
        return nn.functional.embedding(input_ids, self.weight)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Embedding:
        super()._apply(fn, recurse)
        weight = self.__dict__.get("weight")
        if isinstance(weight, Int8Weight):
            self.__dict__["weight"] = weight.to(fn(torch.empty(0, device=weight.device)).device)
        elif weight is not None:
            self.device = fn(torch.empty(0, device=self.device)).device
        return self
