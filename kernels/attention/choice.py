"""Choose an attention back end by trying it on a small problem.

Nothing is decided by a version: a back end is used for a type, head count, head dimension and
device only after it solved a small problem of that kind, forward and backward, and agreed with
plain arithmetic (documents apart, window exact), in the layout that the layer's projections have.
That costs a few small launches once per process.
cuDNN goes before flash only where torch's own chooser prefers it for this problem. In torch's
deterministic mode only back ends whose backward pass repeats its bits are taken, and tried for that
too.
`ENGINE_ATTENTION=name` chooses on purpose, without a trial: what cannot run then raises. `explain`
says what each back end answered.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from kernels.attention.backends import Backend
from kernels.attention.documents import AttentionPlan, AttentionSettings
from kernels.attention.reference import documents_backward, documents_forward
from kernels.attention.table import BACKENDS
from kernels.runtime.simulation import simulated_gpu
from kernels.runtime.trial import refusal, worst_error

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrialKind:
    """What a trial stands for: problems that differ only in their documents.

    `pitches` are elements from row to row of q and of k and v, None where rows are contiguous.
    """

    device: torch.device
    dtype: torch.dtype
    heads: int
    kv_heads: int
    head_dim: int
    windowed: bool
    open: bool = False
    repeats: bool = False
    pitches: tuple[int, int] | None = None


TOLERANCE = {torch.float16: 4e-3, torch.bfloat16: 3e-2, torch.float32: 5e-3}
"""Of the largest value. A leak between documents or a window off by one is an error near 1."""


_PACKED = (0, 1, 6, 136, 333, 461)
"""Documents of one token, within a tile, over several, and none of a tile's length."""


def _sample(kind: TrialKind, name: str) -> tuple[AttentionSettings, list[Tensor]]:
    """A small problem of `kind`, and its q, k, v, do in the layout of a layer's projections."""
    bounds = (0, 128, 256) if name == "cudnn" else _PACKED
    plan = AttentionPlan.from_cu_seqlens(torch.tensor(bounds, dtype=torch.int32), bounds[-1])
    generator = torch.Generator().manual_seed(0)
    heads = (kind.heads, kind.kv_heads, kind.kv_heads, kind.heads)
    values = [
        torch.randn(bounds[-1], h, kind.head_dim, generator=generator, device="cpu") for h in heads
    ]
    q, k, v, do = (x.to(kind.device, kind.dtype) for x in values)
    settings = AttentionSettings(plan, 37 if kind.windowed else None, kind.head_dim**-0.5)
    return settings, [*_laid_out(kind, [q, k, v]), do]


def _laid_out(kind: TrialKind, parts: list[Tensor]) -> list[Tensor]:
    """q, k, v with the pitches of `kind`: columns of one matrix where it is wide enough for all."""
    if kind.pitches is None:
        return parts
    widths = [x[0].numel() for x in parts]
    pitches = [kind.pitches[0], kind.pitches[1], kind.pitches[1]]
    rows = parts[0].shape[0]
    if pitches[0] == pitches[1] >= sum(widths):
        whole = parts[0].new_zeros(rows, pitches[0])
        columns = list(whole[:, : sum(widths)].split(widths, 1))
    else:
        columns = [
            x.new_zeros(rows, max(pitch, width))[:, :width]
            for x, pitch, width in zip(parts, pitches, widths, strict=True)
        ]
    for target, x in zip(columns, parts, strict=True):
        target.copy_(x.flatten(1))
    return [c.unflatten(1, tuple(x.shape[1:])) for c, x in zip(columns, parts, strict=True)]


def _opened(plan: AttentionPlan, device: torch.device) -> AttentionPlan:
    """The same documents, which the host does not know, and three empty ones."""
    padded = [*plan.bounds, *[plan.bounds[-1]] * 3]
    cu_seqlens = torch.tensor(padded, dtype=torch.int32, device=device)
    return AttentionPlan.within(cu_seqlens, 2 * plan.longest)


@cache
def trial(name: str, kind: TrialKind) -> str:
    """ "ok", or why the back end `name` does not serve problems of `kind`."""
    answer = _tried(name, kind)
    withdraw = BACKENDS[name].withdraw
    if answer != "ok" and withdraw is not None:
        withdraw()
    return answer


def _tried(name: str, kind: TrialKind) -> str:
    settings, (q, k, v, do) = _sample(kind, name)
    backend, given = BACKENDS[name], settings
    if kind.open:
        given = replace(settings, plan=_opened(settings.plan, kind.device))
    try:
        out, saved = backend.forward(q, k, v, given)
        got = (out, *backend.backward(do, q, k, v, out, saved, given))
        again = backend.backward(do, q, k, v, out, saved, given) if kind.repeats else got[1:]
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError, ImportError, AttributeError) as error:
        # What this torch, its package or this GPU cannot do. An AttributeError is an op that this
        # torch does not have.
        return refusal(error)
    q, k, v, do = (x.cpu().double() for x in (q, k, v, do))
    truth, _ = documents_forward(q, k, v, settings)
    want = (truth, *documents_backward(do, q, k, v, truth, [], settings))
    for value, true, what in zip(got, want, ("out", "dq", "dk", "dv"), strict=True):
        worst = worst_error(value, true)
        if not worst <= TOLERANCE[kind.dtype]:
            return f"{what} is wrong by {worst:.1e} of its largest value"
    if not all(torch.equal(a, b) for a, b in zip(got[1:], again, strict=True)):
        return "its backward pass does not repeat its bits"
    return "ok"


@cache
def _torch_prefers_cudnn(kind: TrialKind) -> bool:
    """Whether torch's own chooser takes cuDNN for a batch of this kind."""
    chooser = getattr(torch, "_fused_sdp_choice", None)
    if chooser is None:
        return False
    q = torch.empty(2, kind.heads, 1024, kind.head_dim, dtype=kind.dtype, device=kind.device)
    q.requires_grad_(True)
    choice: int = chooser(q, q, q, None, 0.0, True)
    return choice == SDPBackend.CUDNN_ATTENTION.value


def _kind(q: Tensor, k: Tensor, windowed: bool, open_: bool = False) -> TrialKind:
    repeats = torch.are_deterministic_algorithms_enabled()
    shape = q.shape[1], k.shape[1], q.shape[2]
    contiguous = q.is_contiguous() and k.is_contiguous()
    pitches = None if contiguous else (q.stride(0), k.stride(0))
    return TrialKind(q.device, q.dtype, *shape, windowed, open_, repeats, pitches)


def _works(backend: Backend, kind: TrialKind) -> bool:
    gpu = simulated_gpu()
    if gpu is not None:
        return backend.name in gpu.attention
    if kind.repeats and not backend.repeats:
        return False
    if backend.name == "documents":
        return True
    if backend.name == "cudnn" and not _torch_prefers_cudnn(kind):
        return False
    return trial(backend.name, kind) == "ok"


@cache
def _announce(name: str, kind: TrialKind) -> None:
    _log.info("attention runs as %s for %s", name, kind)


def forced_backend() -> str | None:
    """What ENGINE_ATTENTION names. Raises `ValueError` for what is no back end."""
    forced = os.environ.get("ENGINE_ATTENTION")
    if forced and forced not in BACKENDS:
        raise ValueError(f"ENGINE_ATTENTION is {forced!r}; expected one of {list(BACKENDS)}")
    return forced


def select(q: Tensor, k: Tensor, settings: AttentionSettings) -> Backend:
    """The first back end that suits this problem and has proved that it solves its kind.

    Meta tensors, on which nothing can be tried, get flash where it suits, else documents.
    """
    forced = forced_backend()
    if forced:
        if torch.are_deterministic_algorithms_enabled() and not BACKENDS[forced].repeats:
            raise ValueError(
                f"ENGINE_ATTENTION is {forced!r}, whose backward pass does not repeat its bits; "
                f"deterministic runs take one of {[b.name for b in BACKENDS.values() if b.repeats]}"
            )
        return BACKENDS[forced]
    if q.is_meta:
        return BACKENDS["flash" if BACKENDS["flash"].suits(q, k, settings) else "documents"]
    kind = _kind(q, k, settings.hiding_window is not None, settings.plan.most is not None)
    for backend in BACKENDS.values():
        if backend.suits(q, k, settings) and _works(backend, kind):
            _announce(backend.name, kind)
            return backend
    raise RuntimeError(f"no attention back end for {kind}: {explain(q, k)}")


def explain(q: Tensor, k: Tensor, windowed: bool = False) -> dict[str, str]:
    """What every back end answers to a trial on the device and in the type and shape of q, k."""
    kind = _kind(q, k, windowed)
    return {name: trial(name, kind) for name in BACKENDS}
