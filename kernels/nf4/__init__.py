"""NF4: quantise, decode and multiply by four-bit weights."""

from kernels.nf4.weight import (
    BLOCK_SIZES,
    NF4_CODE,
    NF4Weight,
    dequantize,
    dequantize_rows,
    quantize,
)

__all__ = ["BLOCK_SIZES", "NF4_CODE", "NF4Weight", "dequantize", "dequantize_rows", "quantize"]
