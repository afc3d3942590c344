"""Check every attention back end on packed and on equally long documents."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from engine.benchmark.cases.case import leaf
from engine.selfcheck.options import CheckOptions, Finding, failed, not_run, passed
from kernels.attention import (
    AttentionPlan,
    AttentionSettings,
    attention_backward,
    attention_forward,
)
from kernels.attention.choice import TOLERANCE
from kernels.attention.table import BACKENDS
from kernels.runtime.trial import refusal, worst_error

_PACKINGS = {
    "packed": [0, 1, 70, 133, 261],
    "equal": [0, 128, 256],
    "packed, window": [0, 1, 70, 133, 261],
}
_HEADS, _KV_HEADS, _SPARE = 8, 2, 24
_NAMES = ("o", "dq", "dk", "dv")


def backend_check(name: str) -> Callable[[CheckOptions], Finding]:
    """A check of one back end against attention in float64, on strided inputs as layers make them.

    A back end that does not suit a packing, or cannot run here, is not run: training then takes
    another.
    """

    def run(options: CheckOptions) -> Finding:
        served, refused = [], []
        for packing, bounds in _PACKINGS.items():
            for width in (64, 128):
                label = f"{packing}, heads of {width}"
                wrong = _check(name, packing, bounds, width, options)
                if wrong is None:
                    served.append(label)
                elif wrong.startswith("wrong"):
                    return failed(f"{label}: {wrong}")
                else:
                    refused.append(f"{label}: {wrong}")
        if not served:
            return not_run(f"not for this GPU or torch: {refused[0]}")
        return passed(f"{len(served)} of {len(served) + len(refused)} problems: its own", refused)

    return run


def _check(
    name: str, packing: str, bounds: list[int], width: int, options: CheckOptions
) -> str | None:
    """None, or why the back end does not serve the problem, beginning with "wrong" if it should."""
    dtype, device = options.dtypes[0], options.device
    plan = AttentionPlan.from_cu_seqlens(torch.tensor(bounds, dtype=torch.int32), bounds[-1])
    window = 37 if "window" in packing else None
    settings = AttentionSettings(plan, window, width**-0.5, name)
    q, k, v, do = strided_inputs(bounds[-1], width, dtype, device)
    if name != "cpu" and not BACKENDS[name].suits(q, k, settings):
        return "made for other problems"
    try:
        o, saved = attention_forward(q, k, v, settings)
        ours = (o, *attention_backward(do, q, k, v, o, saved, settings))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except (RuntimeError, NotImplementedError, TypeError, AttributeError, ImportError) as error:
        return refusal(error)
    truth = _plain((q, k, v, do), bounds, window)
    for what, value, true in zip(_NAMES, ours, truth, strict=True):
        worst = worst_error(value, true)
        if not worst <= TOLERANCE[dtype]:
            return f"wrong: {what} is off by {worst:.1e} of its largest value"
    return None


def strided_inputs(
    tokens: int, width: int, dtype: torch.dtype, device: torch.device
) -> list[Tensor]:
    """q, k, v as columns of one matrix with spare columns, as a layer's projections are, and do."""
    columns = (_HEADS + 2 * _KV_HEADS) * width
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(tokens, columns + _SPARE, generator=generator).to(device, dtype)
    parts = whole[:, :columns].split([_HEADS * width, _KV_HEADS * width, _KV_HEADS * width], 1)
    do = torch.randn(tokens, _HEADS, width, generator=generator).to(device, dtype)
    return [*(part.unflatten(1, (-1, width)) for part in parts), do]


def _plain(tensors: Sequence[Tensor], bounds: list[int], window: int | None) -> tuple[Tensor, ...]:
    """o, dq, dk, dv by two products and a softmax, in float64 on the CPU."""
    q, k, v, do = (x.detach().cpu().double() for x in tensors)
    leaves = [leaf(x) for x in (q, k, v)]
    groups, tokens = q.shape[1] // k.shape[1], q.shape[0]
    index = torch.arange(tokens)
    document = torch.bucketize(index, torch.tensor(bounds[1:]), right=True)
    distance = index[:, None] - index[None]
    seen = (document[:, None] == document[None]) & (distance >= 0)
    if window is not None:
        seen &= distance < window
    heads = [leaves[0], *(x.repeat_interleave(groups, 1) for x in leaves[1:])]
    wide_q, wide_k, wide_v = (x.transpose(0, 1) for x in heads)
    scores = (wide_q @ wide_k.mT * q.shape[-1] ** -0.5).masked_fill(~seen, float("-inf"))
    o = (scores.softmax(-1) @ wide_v).transpose(0, 1)
    return (o.detach(), *torch.autograd.grad(o, leaves, do))
