"""Placeholders for weights that are elsewhere: reading one is an error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

_HARMLESS = {torch.ops.aten.detach.default, torch.ops.aten.alias.default}


class Absent(Tensor):
    """A tensor without memory, of the shape, strides, dtype and device of another.

    Tensors of the meta device would not do: a product with one of them writes nothing to its `out`,
    and whatever was in that memory goes on as a result.
    """

    @staticmethod
    def __new__(cls, like: Tensor) -> Absent:
        made: Absent = Tensor._make_wrapper_subclass(
            cls, like.shape, strides=like.stride(), dtype=like.dtype, device=like.device
        )
        return made

    def __init__(self, like: Tensor) -> None:
        """`like` is forgotten."""

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in _HARMLESS:
            return Absent(args[0])
        raise RuntimeError(
            f"{func} reads a weight of which this rank has a share alone, outside its layer's turn"
        )

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Absent({tuple(self.shape)}, {self.dtype}, {self.device})"
