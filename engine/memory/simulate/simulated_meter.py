"""A memory meter under which meta tensors compute nothing.

They count with the bytes that they would take. Ops that make new tensors are worked out once per
shape, ops that write in place not at all. What the host asks of a device's numbers is answered as
by a healthy step, and integers stay real. The operations of matrix products and attention are
counted on the way.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map

from engine.memory.simulate.meter import SCRATCH, MemoryMeter
from kernels.runtime.simulation import SimulatedGPU, nothing

_ATEN = torch.ops.aten
META = torch.device("meta")
CUDA_GRANULE = 512
"""torch's CUDA caching allocator rounds a request up to this."""

R = TypeVar("R")
T = TypeVar("T")


class SimulatedMeter(MemoryMeter):
    """A meter under which meta tensors compute nothing and hold the bytes they would hold.

    What the host asks of a device's numbers is answered as by a healthy step: all is finite.
    Integers stay real wherever they are sent.
    """

    aside: tuple[str, ...] = SCRATCH
    """Scratch grows in this step, and is all there in every later one: it is added at the end."""

    def __init__(self, gpu: SimulatedGPU | None = None) -> None:
        super().__init__(1 if gpu is None else CUDA_GRANULE)
        self.gpu = gpu
        self.flops = 0.0
        self._transients: dict[Hashable, tuple[int, float]] = {}
        self.host = self.host_high = 0
        self._put_aside: set[weakref.ref[Any]] = set()

    def once(self, key: Hashable, run: Callable[[], R], result: Callable[[], R]) -> R:
        """Run an op for the first of each key; for later ones count the peak that it had."""
        if key in self._transients:
            made = result()
            transient, operations = self._transients[key]
            self.bump(transient)
            self.flops += operations
            return made
        self.mark()
        outer, self.high, before = self.high, self.counted, self.flops
        made = run()
        self.mark()
        self._transients[key] = self.high - self.counted, self.flops - before
        self.high = max(outer, self.high)
        return made

    def some(self, parts: Sequence[T]) -> Iterator[T]:
        """The first two parts and the last, which may be short; the rest is as the second."""
        for index, part in enumerate(parts):
            if 2 <= index < len(parts) - 1:
                continue
            before = self.flops
            yield part
            if index == 1:
                self.flops += (self.flops - before) * max(0, len(parts) - 3)

    def launch(self, kernel: Any, operations: float) -> Callable[..., Any]:
        """Nothing is launched, and outputs stay as they were allocated; operations are counted."""
        self.flops += operations
        return nothing

    def host_tensor(self, shape: Sequence[int], dtype: torch.dtype, taken: int) -> Tensor:
        """A tensor in the host's memory, which beside a GPU's is counted apart."""
        if self.gpu is None:
            return torch.empty(tuple(shape), dtype=dtype, device="meta")
        with self.shapes_only():
            tensor = torch.empty(tuple(shape), dtype=dtype, device="meta")
        self._count_on_host(tensor, taken)
        return tensor

    def stays_on_host(self, tensor: Tensor) -> None:
        """Count nothing for a tensor of the host, unless the host's memory is what is counted."""
        if self.gpu is not None:
            self.ignore([tensor])

    def shapes_only(self) -> AbstractContextManager[Any]:
        """Nothing that is made inside is counted."""
        return cast(AbstractContextManager[Any], _disable_current_modes())

    def _count_on_host(self, tensor: Tensor, size: int) -> None:
        self.ignore([tensor])
        self.host += size
        self.host_high = max(self.host, self.host_high)

        def freed(reference: weakref.ref[Any]) -> None:
            self.host -= size
            self._put_aside.discard(reference)

        self._put_aside.add(weakref.ref(tensor.untyped_storage(), freed))

    def execute(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        count = _PRODUCTS.get(func)
        if count is not None:
            self.flops += count(args)
        tensors = _tensors_of(args, kwargs)
        meta = sum(1 for t in tensors if t.is_meta)
        if func is _ATEN._to_copy.default:
            moved = _moved(args[0], kwargs)
            if moved is not None:
                return moved
        if not meta:
            return func(*args, **kwargs)
        if func is _ATEN._local_scalar_dense.default:
            return _healthy(args[0].dtype)
        if func is _ATEN._flash_attention_backward.default:
            results = sum(x.numel() * x.itemsize for x in args[1:4])
            self.bump(results + _flash_workspace(args[1], args[2], args[6], self.gpu))
        kind = _kind(func)
        if kind == "in place":
            return args[0] if func._schema.returns else None
        if kind == "out" and _out_name(func) in kwargs:
            return kwargs[_out_name(func)]
        if kind == "pure":
            return _like_before(func, args, kwargs)
        if meta < len(tensors):
            args, kwargs = tree_map(_without_data, (args, kwargs))
        return func(*args, **kwargs)


def _matmul(left: Tensor, right: Tensor) -> float:
    return 2.0 * left.numel() * int(right.shape[-1])


def _attention(q: Tensor, tokens: int, products: float, bounds: Tensor | None = None) -> float:
    """Causal attention's products: half of T^2 for each document, head and element of a head."""
    pairs = float(tokens) ** 2
    if bounds is not None:
        pairs = float((bounds.diff().double() ** 2).sum())
    heads_dim = q.shape[-1] * (q.shape[-2] if bounds is not None else q.shape[0] * q.shape[1])
    return products * pairs * heads_dim


_FACTORS = {
    "mm": 0,
    "bmm": 0,
    "addmm": 1,
    "addmm_": 1,
    "baddbmm": 1,
    "baddbmm_": 1,
    "_grouped_mm": 0,
}
"""Ops by name, and which argument is the first factor. A row meets one matrix of a group."""


def _products_of(name: str, first: int) -> dict[Any, Callable[[Any], float]]:
    """The overloads of an op, which torch has more of with every version."""
    packet = getattr(_ATEN, name, None)  # torch has _grouped_mm since 2.8
    overloads = packet.overloads() if packet is not None else ()
    return {
        getattr(packet, overload): lambda a: _matmul(a[first], a[first + 1])
        for overload in overloads
    }


_PRODUCTS: dict[Any, Callable[[Any], float]] = {
    **{op: count for name, at in _FACTORS.items() for op, count in _products_of(name, at).items()},
    _ATEN._scaled_dot_product_flash_attention_for_cpu.default: lambda a: _attention(
        a[0], a[0].shape[2], 2.0
    ),
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward.default: lambda a: _attention(
        a[1], a[1].shape[2], 5.0
    ),
    _ATEN._flash_attention_forward.default: lambda a: _attention(a[0], 0, 2.0, a[3]),
    _ATEN._flash_attention_backward.default: lambda a: _attention(a[1], 0, 5.0, a[6]),
}
"""Floating-point operations of the ops that do nearly all of them, from their arguments."""


def _tensors_of(args: Any, kwargs: dict[str, Any]) -> list[Tensor]:
    tensors: list[Tensor] = []
    for x in (*args, *kwargs.values()):
        if isinstance(x, Tensor):
            tensors.append(x)
        elif isinstance(x, list | tuple):
            tensors += [item for item in x if isinstance(item, Tensor)]
    return tensors


@cache
def _kind(func: Any) -> str:
    """What an op does to memory: "pure" makes its outputs anew, "in place" makes nothing."""
    schema = func._schema
    returned = [result.alias_info for result in schema.returns]
    if not schema.is_mutable:
        return "view" if any(returned) else "pure"
    if not returned or (len(returned) == 1 and schema.arguments[0].alias_info is not None):
        return "in place"
    return "out" if len(returned) == 1 else "other"


@cache
def _out_name(func: Any) -> str:
    """The argument that an op of kind "out" writes: `out`, or what its gradient is called."""
    written = [a for a in func._schema.arguments if a.alias_info and a.alias_info.is_write]
    return str(written[0].name)


_outcomes: dict[Any, Any] = {}
"""Op and descriptions of its arguments -> descriptions of its results."""


def _like_before(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """The result of an op on meta tensors. torch works each one out in Python, which is slow."""
    key = (func, _described(args), _described(tuple(kwargs.items())))
    outcome = _outcomes.get(key)
    if outcome is None:
        plain_args, plain_kwargs = tree_map(_without_data, (args, kwargs))
        result = func(*plain_args, **plain_kwargs)
        _outcomes[key] = tree_map(_description, result)
        return result
    return _made(outcome)


@dataclass(frozen=True)
class _Description:
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


def _description(x: Any) -> Any:
    return _Description(tuple(x.shape), x.stride(), x.dtype) if isinstance(x, Tensor) else x


def _described(x: Any) -> Any:
    """A hashable stand-in for an argument, in which True is not 1."""
    if isinstance(x, Tensor):
        return tuple(x.shape), x.stride(), x.dtype
    if isinstance(x, list | tuple):
        return tuple(_described(item) for item in x)
    return type(x), x


def _made(outcome: Any) -> Any:
    if isinstance(outcome, _Description):
        return torch.empty_strided(
            outcome.shape, outcome.stride, dtype=outcome.dtype, device="meta"
        )
    if isinstance(outcome, list | tuple):
        return type(outcome)(_made(item) for item in outcome)
    return outcome


def _healthy(dtype: torch.dtype) -> bool | int | float:
    return True if dtype == torch.bool else 1.0 if dtype.is_floating_point else 0


def _moved(source: Tensor, options: dict[str, Any]) -> Tensor | None:
    """What becomes of a copy to another device, where it is not an ordinary one.

    Integers, such as positions, stay real; what is computed of them in floating point need not be.
    """
    device, dtype = options.get("device"), options.get("dtype")
    numbers = not source.is_meta and source.dim() and not source.is_floating_point()
    if numbers and dtype is not None and dtype.is_floating_point:
        return torch.empty(source.shape, dtype=dtype, device="meta")
    if device is None or (torch.device(device) == META) == source.is_meta:
        return None
    if not source.is_meta:
        keep = not source.is_floating_point() and source.dim() > 0
        return source.detach() if keep else None
    return torch.zeros(source.shape, dtype=options.get("dtype") or source.dtype)


def _without_data(x: Any) -> Any:
    if isinstance(x, Tensor) and not x.is_meta:
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
    return x


def _flash_workspace(
    q: Tensor, k: Tensor, boundaries: Tensor, gpu: SimulatedGPU | None = None
) -> int:
    """What FlashAttention-2's backward holds inside, for q (N, Hq, D) and k (N, Hkv, D).

    dQ and a row sum in fp32, 128 rows more for each document, and where heads are grouped dK and dV
    for every query head (`mha_varlen_bwd` in torch's flash_api.cpp). To repeat its bits it adds up
    dQ in as many buffers as fill the multiprocessors.
    """
    tokens, heads, dim = q.shape
    documents = boundaries.numel() - 1
    rows = (tokens + 128 * documents) * heads
    copies = 1
    if gpu is not None and gpu.repeats:
        copies = -(-gpu.multiprocessors // (documents * heads))
    expanded = 0 if heads == k.shape[1] else 2 * tokens * heads * dim * q.itemsize
    return copies * rows * (-(-dim // 32) * 32) * 4 + rows * 4 + expanded
