"""Quantise and decode 4-bit NF4 weights, and multiply by them."""

from kernels.nf4.decode import dequantize, dequantize_rows
from kernels.nf4.encode import quantize
from kernels.nf4.weight import BLOCK_SIZES, NF4_CODE, NF4Weight

__all__ = ["BLOCK_SIZES", "NF4_CODE", "NF4Weight", "dequantize", "dequantize_rows", "quantize"]
