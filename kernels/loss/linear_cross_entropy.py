"""Output head and cross-entropy in one op that never holds all logits.

For the hidden states h (n, H) of trained tokens, a head W (V, H) and their targets y (n,):

    z = h W^T,   loss = sum_i (logsumexp(z_i) - z_i[y_i]) / num_items
    dz = softmax(z) - onehot(y),   dh = dz W / num_items,   dW = dz^T h / num_items

The gradient is formed in the forward pass, in the memory of the logits, one chunk of tokens at a
time, so a frozen head costs two matrix products a chunk and nothing is recomputed. The factor
1 / num_items enters in the products, where it cannot underflow in fp16. Nothing here waits for the
device. Label smoothing, z-loss and weights of tokens change loss and dz as
`kernels.loss.cross_entropy` says.

A frozen head may be 8-bit rows (`kernels.linear.int8`): it is decoded in slabs of its rows, for the
logits and again for dh, whose parts are added up in fp32. Source: the chunked form follows Hsu et
al. 2024 (Liger-Kernel, arXiv 2410.10989); the maths is the softmax's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.linear.int8 import Int8Weight, dequantize_int8
from kernels.loss.cross_entropy import PLAIN, LossTerms, cross_entropy_
from kernels.runtime.scratch import scratch
from kernels.runtime.simulation import equal_parts, simulated_gpu

_CPU_CHUNK_BYTES = 64 * 2**20
_GPU_CHUNK_BYTES = 256 * 2**20
_GPU_CHUNK_TOKENS = 1024
_SLAB_BYTES = 16 * 2**20
_GPU_SLAB_BYTES = 64 * 2**20
_SCALED_ROWS = 1 << 14

Head = Tensor | Int8Weight


def chunk_tokens(vocab_size: int, itemsize: int, *, gpu: bool) -> int:
    """Trained tokens whose logits exist at a time, where nobody asks for a number.

    A GPU needs tall chunks, for each one reads the whole head twice: whole multiples of 1,024 rows,
    so that no wave of a product's tiles is nearly empty, of at most 256 MiB where that allows more
    than one. On a CPU the time is the same from about 100 rows on, so 64 MiB in fp32 are enough.
    """
    if gpu:
        most = _GPU_CHUNK_BYTES // (vocab_size * itemsize)
        return max(1, most // _GPU_CHUNK_TOKENS) * _GPU_CHUNK_TOKENS
    return max(64, _CPU_CHUNK_BYTES // (vocab_size * 4))


def logits_buffer(rows: int, vocab_size: int, hidden: Tensor) -> Tensor:
    """Room for one chunk. Fresh memory costs page faults on a CPU; a GPU's is pooled."""
    if hidden.is_cuda:
        return torch.empty((rows, vocab_size), dtype=hidden.dtype, device=hidden.device)
    return scratch("logits", (rows, vocab_size), hidden.dtype, hidden.device)


def chunks(count: int, rows: int) -> Iterable[slice]:
    """The rows of every chunk."""
    return equal_parts(slice(at, min(at + rows, count)) for at in range(0, count, rows))


def _slabs(head: Int8Weight, like: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """(rows, these rows of the head as a dense matrix in scratch), in the dtype of `like`.

    The scratch is that of the layers' weights, none of which is decoded while the loss is formed.
    On a CPU a slab stays in its cache; a GPU's is large enough for a product that fills it.
    """
    vocab_size, width = head.shape
    most = _GPU_SLAB_BYTES if like.is_cuda else _SLAB_BYTES
    step = min(vocab_size, max(64, most // (width * like.itemsize)))
    for start in equal_parts(range(0, vocab_size, step)):
        rows = slice(start, min(start + step, vocab_size))
        part = Int8Weight(head.codes[rows], head.absmax[rows], head.dtype)
        buffer = scratch("decoded.wide", (step, width), like.dtype, like.device)
        yield rows, dequantize_int8(part, like.dtype, out=buffer[: rows.stop - start])


def dense_head(weight: Head, hidden: Tensor) -> Head:
    """The head in the dtype of the products."""
    if isinstance(weight, Tensor) and weight.dtype != hidden.dtype:
        return weight.to(hidden.dtype)
    return weight


def head_logits(hidden: Tensor, head: Head, out: Tensor | None = None) -> Tensor:
    """hidden (n, H) times the head (V, H), transposed: logits (n, V), in `out` if given."""
    if isinstance(head, Tensor):
        return torch.mm(hidden, head.T, out=out)
    if out is None:
        out = hidden.new_empty(hidden.shape[0], head.shape[0])
    for rows, part in _slabs(head, hidden):
        torch.mm(hidden, part.T, out=out[:, rows])
    return out


def head_gradient(dlogits: Tensor, head: Head, scale: float, target: Tensor) -> None:
    """target (n, H) = scale * dlogits (n, V) times the head."""
    if isinstance(head, Tensor):
        torch.addmm(target, dlogits, head, beta=0, alpha=scale, out=target)
        return
    wide = torch.promote_types(target.dtype, torch.float32)
    total = torch.zeros(target.shape, dtype=wide, device=target.device)
    for rows, part in _slabs(head, target):
        total.add_(dlogits[:, rows] @ part, alpha=scale)
    target.copy_(total)


def multiplies_into_fp32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch adds a product of 16-bit matrices to an fp32 one without converting them."""
    gpu = simulated_gpu()
    return _tried_into_fp32(device, dtype) if gpu is None else gpu.multiplies_into_fp32


@cache
def _tried_into_fp32(device: torch.device, dtype: torch.dtype) -> bool:
    if device.type != "cuda" or not hasattr(torch.ops.aten.addmm, "dtype_out"):
        return False
    left = torch.eye(16, dtype=dtype, device=device)
    got = torch.ones(16, 16, device=device)
    try:
        torch.ops.aten.addmm.dtype_out(got, left, left, torch.float32, beta=1, alpha=0.5, out=got)
    except RuntimeError:
        return False
    return torch.equal(got, 1.0 + 0.5 * left.float())


def add_outer_(dweight: Tensor, dlogits: Tensor, hidden: Tensor, scale: float) -> None:
    """dweight (V, H), fp32 or wider, += scale * dlogits^T hidden."""
    if dlogits.dtype == dweight.dtype:
        dweight.addmm_(dlogits.T, hidden, alpha=scale)
    elif multiplies_into_fp32(dweight.device, dlogits.dtype):
        torch.ops.aten.addmm.dtype_out(
            dweight, dlogits.T, hidden, torch.float32, beta=1, alpha=scale, out=dweight
        )
    else:
        dweight.addmm_(dlogits.T.to(dweight.dtype), hidden.to(dweight.dtype), alpha=scale)


@dataclass(frozen=True)
class _Targets:
    """The targets (n,) of trained tokens, their weights (n,), if any, and the loss's terms."""

    ids: Tensor
    weights: Tensor | None
    terms: LossTerms

    def loss_(self, logits: Tensor, part: slice, gradient: bool) -> Tensor:
        """The losses of a chunk of tokens, whose logits become their gradient."""
        weights = None if self.weights is None else self.weights[part]
        return cross_entropy_(
            logits, self.ids[part], gradient=gradient, weights=weights, terms=self.terms
        )


def _forward(
    hidden: Tensor,
    weight: Head,
    targets: _Targets,
    scale: float,
    rows: int,
    need_dhidden: bool,
    need_dweight: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """loss (fp32 or wider scalar), d loss / d hidden (n, H), d loss / d weight (V, H)."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    count, vocab_size = hidden.shape[0], weight.shape[0]
    losses = torch.empty(count, dtype=wide, device=hidden.device)
    dhidden = torch.empty_like(hidden) if need_dhidden else None
    dweight = torch.zeros(weight.shape, dtype=wide, device=hidden.device) if need_dweight else None
    head = dense_head(weight, hidden)
    buffer = logits_buffer(min(rows, count), vocab_size, hidden)
    for part in chunks(count, rows):
        logits = head_logits(hidden[part], head, buffer[: part.stop - part.start])
        losses[part] = targets.loss_(logits, part, need_dhidden or need_dweight)
        if dhidden is not None:
            head_gradient(logits, head, scale, dhidden[part])
        if dweight is not None:
            add_outer_(dweight, logits, hidden[part], scale)
    total = losses.sum(dtype=torch.float64) * scale
    return total.to(wide), dhidden, dweight


def _scaled(dweight: Tensor, dloss: Tensor, dtype: torch.dtype) -> Tensor:
    """dweight (V, H) times dloss () in `dtype`.

    For 16-bit weights without a second matrix in fp32, which a CPU's product would make inside.
    """
    scaled = torch.empty_like(dweight, dtype=dtype)
    for source, target in zip(dweight.split(_SCALED_ROWS), scaled.split(_SCALED_ROWS), strict=True):
        torch.mul(source, dloss, out=target)
    return scaled


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, hidden: Tensor, weight: Head, targets: _Targets, num_items: float, rows: int
    ) -> Tensor:
        need_dhidden, need_dweight = ctx.needs_input_grad[:2]
        loss, dhidden, dweight = _forward(
            hidden, weight, targets, 1.0 / num_items, rows, need_dhidden, need_dweight
        )
        ctx.save_for_backward(dhidden, dweight)
        ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss: Tensor):  # type: ignore[no-untyped-def]
        dhidden, dweight = ctx.saved_tensors
        if dhidden is not None:
            dhidden = dhidden * dloss.to(dhidden.dtype)
        if dweight is not None:
            dweight = _scaled(dweight, dloss, ctx.weight_dtype)
        return dhidden, dweight, None, None, None


def linear_cross_entropy(
    hidden: Tensor,
    weight: Head,
    targets: Tensor,
    num_items: float | None = None,
    tokens_per_chunk: int | None = None,
    weights: Tensor | None = None,
    terms: LossTerms = PLAIN,
) -> Tensor:
    """Cross-entropy of `hidden @ weight.T` against `targets`, summed and divided by `num_items`.

    hidden (n, H) and targets (n,) int64 are those of the trained tokens alone; weight (V, H) is
    dense, or frozen in 8-bit rows. `num_items` is the number of trained tokens of the whole
    accumulated batch, or the sum of their weights (n,) where they have some, by default n;
    `terms` are smoothing of the labels and a z-loss; `tokens_per_chunk` is by default
    `chunk_tokens`. Returns a scalar in fp32 or wider, 0 where n is 0.

    Raises `ValueError` for mismatching shapes and, in the reference on a CPU, for a target outside
    the vocabulary; on a GPU, where the check would wait for the device, such a target makes the
    loss NaN.
    """
    if hidden.dim() != 2 or targets.shape != hidden.shape[:1] or weight.shape[1] != hidden.shape[1]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}, targets "
            f"{tuple(targets.shape)} do not fit; expected (n, H), (V, H), (n,)"
        )
    if num_items is None:
        num_items = max(1, hidden.shape[0])
    rows = tokens_per_chunk or chunk_tokens(weight.shape[0], hidden.itemsize, gpu=hidden.is_cuda)
    loss: Tensor = _LinearCrossEntropy.apply(
        hidden, weight, _Targets(targets, weights, terms), num_items, rows
    )
    return loss
