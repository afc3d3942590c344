"""Few rows of activations on a CPU: products, norms, rotation and SwiGLU.

They are for the next tokens of sequences: such a pass reads every weight once and computes little
with it. The loops here, compiled by numba, read weights as they are stored, in fp32, bf16, NF4 or
8-bit rows, at the speed of memory, and do in one call what torch does in several.
"""
