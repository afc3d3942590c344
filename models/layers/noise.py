"""NEFTune: uniform noise on the embeddings of a training step.

For a token of a document of L tokens and an embedding of width H, with u uniform in [-1, 1]:

    x = x + alpha / sqrt(L H) u

Source: Jain et al. 2023, arXiv 2310.05914. The noise is a function of the step's seed and of
torch's generator of the device; it has no gradient of its own. Nothing is added in evaluation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.runtime.simulation import simulated_gpu
from models.parallel.token_slices import TokenSlices


def with_noise(
    x: Tensor, cu_seqlens: Tensor, alpha: float, seed: int, slices: TokenSlices | None = None
) -> Tensor:
    """x (N, H) of documents at the boundaries cu_seqlens (D + 1,), with noise added.

    Of `slices` x is this rank's; it has noise of its own, other than that of the whole.
    """
    lengths = cu_seqlens.diff()
    size = alpha / (lengths.to(torch.float32) * x.shape[1]).sqrt()
    tokens = x.shape[0] if slices is None else slices.tokens
    each = torch.repeat_interleave(size, lengths.long(), output_size=tokens)
    if slices is not None:
        each, seed = slices.own(each), seed + slices.first
    noise = torch.empty_like(x, requires_grad=False)
    if not noise.is_meta and simulated_gpu() is None:
        generator = torch.Generator(device=x.device).manual_seed(seed)
        noise.uniform_(-1.0, 1.0, generator=generator)
    return x + noise.mul_(each.unsqueeze(1).to(x.dtype))
