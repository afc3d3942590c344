"""Philox-4x32-10: random bits as a function of a seed and a counter.

Source: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011. `tl.philox` computes
the same function, so that a Triton kernel and its torch reference draw the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK32 = 0xFFFFFFFF
_MUL_A, _MUL_B = 0xD2511F53, 0xCD9E8D57
_KEY_A, _KEY_B = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10


Word = int | Tensor
"""A 32-bit word: a number, or int64 in [0, 2^32) of any shape."""


def philox(key: Word, counter: tuple[Word, Word, Word, Word]) -> tuple[Word, Word, Word, Word]:
    """The four words of Philox for a 64-bit `key` and the words of a counter, which broadcast."""
    c0, c1, c2, c3 = counter
    key0, key1 = key & _MASK32, (key >> 32) & _MASK32
    for _ in range(_ROUNDS):
        # The product of two 32-bit numbers wraps in int64, yet its 64 bits are the right ones.
        product0, product2 = c0 * _MUL_A, c2 * _MUL_B
        c0 = ((product2 >> 32) & _MASK32) ^ c1 ^ key0
        c2 = ((product0 >> 32) & _MASK32) ^ c3 ^ key1
        c1, c3 = product2 & _MASK32, product0 & _MASK32
        key0, key1 = (key0 + _KEY_A) & _MASK32, (key1 + _KEY_B) & _MASK32
    return c0, c1, c2, c3


def philox_bits(seed: int, index: Tensor, *words: int) -> Tensor:
    """The first word of Philox, int64 in [0, 2^32), for the counter (index, *words).

    `index` is int64 of any shape and below 2^32; up to three `words` follow it, missing ones are 0.
    The key is made of the two halves of `seed`.
    """
    c1, c2, c3 = (torch.full_like(index, word) for word in (*words, 0, 0, 0)[:3])
    bits = philox(seed, (index & _MASK32, c1, c2, c3))[0]
    assert isinstance(bits, Tensor)
    return bits


def derived_seed(seed: int, *words: int) -> int:
    """A seed of 63 bits for a use that up to three `words` below 2^32 name: 0 for those left out.

    Seeds of different uses are as different as random ones; sums of a seed and a number are not,
    for two runs may share them.
    """
    first, second, third = (*words, 0, 0, 0)[:3]
    low, high, _, _ = philox(seed & (1 << 64) - 1, (first, second, third, 0))
    assert isinstance(low, int) and isinstance(high, int)
    return (high << 32 | low) >> 1


def round_stochastically(values: Tensor, bits: Tensor) -> Tensor:
    """Round fp32 `values` to bf16, up with the probability that makes the mean exact.

    The low 16 of the random `bits` (int64) are added below bf16's last place, then cut off.
    """
    raised = values.contiguous().view(torch.int32) + (bits & 0xFFFF).to(torch.int32)
    return (raised & -65536).view(torch.float32).to(torch.bfloat16)
