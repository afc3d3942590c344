"""Quantise weights to the block formats of GGUF files."""

from kernels.gguf.formats import FORMATS, BlockFormat, quantize

__all__ = ["FORMATS", "BlockFormat", "quantize"]
