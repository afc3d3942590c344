"""The base weights under an adapter whose initialisation changes them.

PEFT repeats these initialisations whenever it loads such an adapter, and the pair that was trained
is added to what they leave of a weight W (out, in), for rank r and scale s:

    pissa   W - U_r S_r V_r^T, its r largest singular values
    olora   W - s Q_r R_r of W = Q R
    kasa    W without its r smallest singular values
    loftq   the 4-bit or 8-bit values of W, corrected by alternating rounds of a rank-r remainder

Sources: Meng et al. 2024, arXiv 2404.02948; Buyukakyuz 2024, arXiv 2406.01775; Wang et al. 2024,
arXiv 2412.06071; Li et al. 2023, arXiv 2310.08659.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from engine.errors import CheckpointError
from kernels.nf4 import dequantize, quantize

_MOST_ROUNDS = 100
"""Of LoftQ, each of which decomposes the weight; the paper's tables end at 10."""


def initial_base(
    weight: Tensor, initial: str, rank: int, scale: float, config: Mapping[str, Any]
) -> Tensor:
    """What the initialisation named `initial` leaves of `weight` (out, in), in fp32.

    `config` is adapter_config.json. Raises `CheckpointError` for a LoftQ of other bits than 4 or 8.
    """
    wide = weight.to(torch.float32, copy=True)
    if initial == "olora":
        q, r = torch.linalg.qr(wide)
        return wide.addmm_(q[:, :rank], r[:rank], alpha=-scale)
    if initial == "loftq":
        return _loftq(wide, rank, config.get("loftq_config") or {})
    u, s, v = torch.linalg.svd(wide, full_matrices=False)
    if initial == "pissa":
        return wide.addmm_(u[:, :rank] * s[:rank], v[:rank], alpha=-1.0)
    largest = len(s) - rank
    result: Tensor = (u[:, :largest] * s[:largest]) @ v[:largest]
    return result


def initial_pair(
    weight: Tensor, initial: str, rank: int, scale: float, config: Mapping[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """What an initialisation leaves of `weight` (out, in), and its pair A (r, in) and B (out, r).

    The first is `initial_base`'s, all are fp32. `pissa_niter_N` decomposes with N rounds of a
    randomised algorithm, by torch's own generator. With the factor `scale` the pair makes up for
    what is left out, of LoftQ as well as rank r can.
    """
    wide = weight.to(torch.float32, copy=True)
    if initial == "olora":
        q, r = torch.linalg.qr(wide)
        a, b = r[:rank].clone(), q[:, :rank].clone()
        return wide.addmm_(b, a, alpha=-scale), a, b
    rest = wide
    if initial == "loftq":
        rest = _loftq(wide, rank, {"loftq_bits": 4, **config})
        u, s, v = torch.linalg.svd(wide - rest, full_matrices=False)
    elif initial.startswith("pissa_niter_"):
        rounds = int(initial.removeprefix("pissa_niter_"))
        u, s, vt = torch.svd_lowrank(wide, rank, niter=rounds)
        v = vt.T
    else:
        u, s, v = torch.linalg.svd(wide, full_matrices=False)
    root = (s[:rank] / scale).sqrt()
    a, b = root.unsqueeze(1) * v[:rank], u[:, :rank] * root
    return (rest if initial == "loftq" else wide.addmm_(b, a, alpha=-scale)), a, b


def _loftq(weight: Tensor, rank: int, settings: Mapping[str, Any]) -> Tensor:
    """The quantised values after the asked rounds: quantise W - L R, decompose what is left."""
    bits, rounds = settings.get("loftq_bits", 4), settings.get("loftq_iter", 1)
    if bits not in (4, 8) or not isinstance(rounds, int) or not 1 <= rounds <= _MOST_ROUNDS:
        raise CheckpointError(
            f"loftq_config is {dict(settings)}; expected loftq_bits of 4 or 8 and loftq_iter, its "
            f"rounds, from 1 to {_MOST_ROUNDS}."
        )
    remainder = weight
    for number in range(rounds):
        rounded = _through_bits(remainder, bits)
        if number + 1 < rounds:
            u, s, v = torch.linalg.svd(weight - rounded, full_matrices=False)
            remainder = weight - (u[:, :rank] * s[:rank]) @ v[:rank]
    return rounded


def _through_bits(weight: Tensor, bits: int) -> Tensor:
    """`weight` rounded to NF4 blocks with plain scales, or to int8 rows as bitsandbytes has it."""
    if bits == 4:
        return dequantize(quantize(weight, double_quant=False), dtype=torch.float32)
    largest = weight.to(torch.float16).abs().amax(1, keepdim=True).float()
    codes = torch.round(weight.to(torch.float16).float() * (127.0 / largest.clamp_min(1e-30)))
    return codes * (largest * 7.874015718698502e-3)
