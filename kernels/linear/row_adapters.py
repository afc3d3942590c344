"""LoRA pairs that hold for some rows of an input only.

    z_m = W x_m + s_a B_a (A_a x_m),   y_m = c_a * z_m + b      for every row m of adapter a

So requests of several adapters share a pass: the product with W, which is decoded and read once, is
that of all rows together, and an adapter's two small products are of its own rows alone. c is 1 but
for DoRA. Without gradients. The idea: Chen et al. 2023 (Punica, arXiv 2310.18547).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    pass


@dataclass(frozen=True, eq=False)
class RowAdapter:
    """A pair A (r, in), B (out, r) for `rows` (n,) of the input; None means all of them.

    `row_scale` (out,) is DoRA's c, where it has one.
    """

    rows: Tensor | None
    lora_a: Tensor
    lora_b: Tensor
    scale: float
    row_scale: Tensor | None = None

    def add_to(self, y: Tensor, x: Tensor) -> None:
        """Add the pair's part to its rows of y (N, out), for x (N, in)."""
        a, b = self.lora_a.to(x.dtype), self.lora_b.to(x.dtype)
        if self.rows is None:
            y.addmm_(x @ a.T, b.T, alpha=self.scale)
        else:
            low = x.index_select(0, self.rows) @ a.T
            y.index_add_(0, self.rows, low @ b.T, alpha=self.scale)

    def rescale(self, y: Tensor) -> None:
        """Multiply its rows of z (N, out) by c."""
        if self.row_scale is None:
            return
        factor = self.row_scale.to(y.dtype)
        if self.rows is None:
            y.mul_(factor)
        else:
            y.index_copy_(0, self.rows, y.index_select(0, self.rows) * factor)
