"""The weights of some consecutive experts, cut out of those of all.

Codes and scales stay as they are. Nested scales (`kernels.nf4.weight`) come in blocks of 256, which
may hold scales of two experts: they are then decoded to the plain fp32 scales that they stand for.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from kernels.moe.grouped_matmul import ExpertWeights, planar_experts
from kernels.nf4 import NF4Weight
from kernels.nf4.decode import decode_scales
from kernels.nf4.planar import PlanarNF4Weight, from_planar
from kernels.nf4.weight import NESTED_BLOCK


def share_of(weight: ExpertWeights, first: int, count: int) -> ExpertWeights:
    """Experts first to first + count - 1 of weights (E, out, in), in memory of their own.

    Raises `ValueError` for a block of codes that holds elements of two experts.
    """
    if isinstance(weight, tuple):
        return weight[first : first + count]
    if isinstance(weight, Tensor):
        return weight[first : first + count].clone()
    if isinstance(weight, PlanarNF4Weight):
        experts, out, size = weight.shape
        flat = from_planar(replace(weight, shape=(experts * out, size)))
        return planar_experts(_share(replace(flat, shape=weight.shape), first, count))
    return _share(weight, first, count)


def _share(weight: NF4Weight, first: int, count: int) -> NF4Weight:
    _, out, size = weight.shape
    if out * size % weight.block_size:
        raise ValueError(
            f"experts of {out} x {size} elements in blocks of {weight.block_size} cannot be "
            "divided: some blocks hold elements of two experts"
        )
    blocks = out * size // weight.block_size
    begin, end = first * blocks, (first + count) * blocks
    elements = slice(begin * weight.block_size // 2, end * weight.block_size // 2)
    nested = weight.nested_absmax
    whole = replace(weight, packed=weight.packed[elements].clone(), shape=(count, out, size))
    if nested is not None and begin % NESTED_BLOCK == 0:
        part = nested[begin // NESTED_BLOCK : -(-end // NESTED_BLOCK)].clone()
        return replace(whole, absmax=weight.absmax[begin:end].clone(), nested_absmax=part)
    if nested is None:
        return replace(whole, absmax=weight.absmax[begin:end].clone())
    plain = decode_scales(weight, begin, end)
    return replace(whole, absmax=plain, nested_absmax=None, nested_offset=None)
