"""Weights that are loaded in the codes of their files.

A model that bitsandbytes quantised is used as it is: nothing is rounded a second time, and what its
maker left in 16 bits stays so. Where 16-bit weights are asked for, or another quantisation, the
codes are decoded first.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from engine.config.choices import Quantization
from engine.model_sources.interface.model_source import ModelSource
from engine.model_sources.interface.view import LayersView
from kernels.linear.int8 import Int8Weight
from kernels.nf4 import NF4Weight
from kernels.nf4.decode import decode_scales
from models.layers.experts import EXPERT_PROJECTIONS
from models.tensor_layout import Layout
from models.tensor_names import is_quantised

Codes = NF4Weight | Int8Weight


def stored_kind(source: ModelSource) -> Quantization | None:
    """In which codes the files hold projections, if they hold any so."""
    first = _first_codes(source)
    return None if first is None else kind_of(first)


def kind_of(codes: Codes) -> Quantization:
    """The quantisation that `codes` are in."""
    return "nf4" if isinstance(codes, NF4Weight) else "int8"


def used_weights(
    source: ModelSource, quantization: Quantization | None, double_quant: bool = True
) -> tuple[Quantization | None, bool]:
    """How the projections are quantised where `build_model` is asked for these two."""
    first = _first_codes(source)
    kind = stored_kind(source)
    if kind is None or quantization not in (None, kind):
        return quantization, double_quant
    nested = not isinstance(first, NF4Weight) or first.nested_absmax is not None
    return kind, nested


class _DecodedSource(LayersView):
    """A model source whose codes are not taken."""

    def codes(self, name: str) -> None:
        """None: every tensor is decoded."""


def decoded(source: ModelSource) -> ModelSource:
    """`source` with dense tensors only, for training that computes with 16-bit weights."""
    return source if stored_kind(source) is None else _DecodedSource(source)


def stays_as_stored(source: ModelSource, kind: Quantization | None, name: str) -> bool:
    """Whether 4-bit training on `source` uses tensor `name` just as it is stored.

    `kind` is that of the source. Its codes are not quantised anew, nor is a projection that is left
    in 16 bits beside them; experts, which not every program can quantise, are.
    """
    if kind != "nf4":
        return False
    return source.codes(name) is not None or ".mlp.experts." not in name


def _first_codes(source: ModelSource) -> Codes | None:
    candidates = (source.codes(name) for name in source.names() if is_quantised(name))
    return next((codes for codes in candidates if codes is not None), None)


class StoredCodes:
    """The codes of `source` that a model of quantisation `asked` takes as they are.

    `used` says whether it takes any: they are of the kind that is asked for, or nothing is.
    """

    def __init__(self, source: ModelSource, layout: Layout, asked: Quantization | None) -> None:
        self._source, self._layout = source, layout
        kind = stored_kind(source)
        self.used = kind is not None and asked in (None, kind)

    def weight(self, name: str) -> Codes | None:
        """The graph's matrix `name` in its codes, in memory of its own; None where it is dense."""
        if not self.used or not is_quantised(name) or ".mlp.experts." in name:
            return None
        codes = self._source.codes(self._layout.path(name))
        return None if codes is None else owned(codes)

    def experts(self, name: str, shape: tuple[int, ...]) -> dict[str, list[Codes]] | None:
        """Codes of each expert, by projection, of the graph's parameter `name`; None as above."""
        if not self.used or not is_quantised(name) or self._layout.fused:
            return None
        result: dict[str, list[Codes]] = {}
        for part in self._layout.parts(name, shape):
            codes = self._source.codes(part)
            projection = part.rsplit(".", 2)[-2]
            if codes is None or projection not in EXPERT_PROJECTIONS:
                return None
            result.setdefault(projection, []).append(codes)
        return result


def owned(codes: Codes) -> Codes:
    """A copy that no longer reads the mapped file."""
    if isinstance(codes, Int8Weight):
        return replace(codes, codes=codes.codes.clone(), absmax=codes.absmax.clone())
    own: dict[str, Any] = {name: part.clone() for name, part in codes.tensors().items()}
    return replace(codes, **own)


def joined_experts(parts: list[Codes]) -> NF4Weight | tuple[Codes, ...]:
    """The experts' codes (out, in) as one weight (E, out, in), or one by one where they cannot be.

    Every expert has an offset of its own for nested scales, so the joined ones are plain fp32: the
    decoded values are the same to the bit.
    """
    first = parts[0]
    four_bit = [part for part in parts if isinstance(part, NF4Weight)]
    if (
        not isinstance(first, NF4Weight)
        or len(four_bit) < len(parts)
        or any(
            (part.shape, part.block_size, part.dtype)
            != (first.shape, first.block_size, first.dtype)
            for part in four_bit
        )
        or first.numel() % first.block_size
    ):
        return tuple(owned(part) for part in parts)
    return NF4Weight(
        packed=torch.cat([part.packed for part in four_bit]),
        absmax=torch.cat([_plain_scales(part) for part in four_bit]),
        nested_absmax=None,
        nested_offset=None,
        shape=(len(parts), *first.shape),
        block_size=first.block_size,
        dtype=first.dtype,
    )


def _plain_scales(weight: NF4Weight) -> Tensor:
    return decode_scales(weight, 0, weight.absmax.numel())
