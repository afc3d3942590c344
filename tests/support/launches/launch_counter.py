"""Count a step's device operations, and the bytes that all but the large products move.

The step is simulated at the sizes of a real model (`engine.memory.simulate.step`), so the code for
GPUs runs, with torch's operations and Triton launches going by one after another. Every operation
that is no view counts as a launch. Bytes are those of the tensors with a row per token that it
reads and writes; products of two large dimensions, attention and decoding are left out, for they
are not what elementwise and adapter work is measured by.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

from engine.config.train_config import TrainConfig
from engine.memory.model_shapes import preset_config
from engine.memory.simulate.simulated_meter import SimulatedMeter, _kind, _tensors_of
from engine.memory.simulate.step import simulate_step
from kernels.runtime.simulation import SimulatedGPU
from models.config.model_config import ModelConfig
from models.layers.packed_batch import PackedBatch

ROWS, LENGTH = 4, 4096
TOKENS = ROWS * LENGTH
_LARGE = 512
"""A product whose three dimensions are all at least this is one with a weight."""
_ALLOCATIONS = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach")
_WRITES_ONLY = ("copy_", "zero_", "fill_")
_PRODUCTS = ("mm", "addmm", "addmm_")

T = TypeVar("T")


def _norm_forward(t: Sequence[Tensor], options: dict[str, Any]) -> list[Tensor]:
    x, residual, _, y, total, _ = t
    return [x, y, residual, total] if options["ADD"] else [x, y]


def _norm_backward(t: Sequence[Tensor], options: dict[str, Any]) -> list[Tensor]:
    dy, x, _, _, above, dx, _ = t
    return [dy, x, dx, above] if options["ADD"] else [dy, x, dx]


def _swiglu_backward(t: Sequence[Tensor], options: dict[str, Any]) -> list[Tensor]:
    dh, gate, up = t
    return [dh, gate, gate, up, up, *([dh] if options["KEEP_H"] else [])]


MOVED: dict[str, Callable[[Sequence[Tensor], dict[str, Any]], list[Tensor]]] = {
    "rms_norm_forward_kernel": _norm_forward,
    "rms_norm_backward_kernel": _norm_backward,
    "rope_kernel": lambda t, options: list(t[:4]),
    "swiglu_forward_kernel": lambda t, options: list(t),
    "swiglu_backward_kernel": _swiglu_backward,
    "dequantize_planar_kernel": lambda t, options: [],
    "pack_kernel": lambda t, options: [],
    "unpack_kernel": lambda t, options: [],
}
"""Kernel -> what it reads and writes of its tensors, each as often as it does."""


class LaunchCounter(SimulatedMeter):
    """A simulation's meter that counts launches by name, and bytes by name."""

    last: LaunchCounter

    def __init__(self, gpu: SimulatedGPU | None = None) -> None:
        super().__init__(gpu)
        self.launches: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        type(self).last = self

    def begin(self, kind: str, index: int = 0) -> None:
        """Count from the first layer on: loading and adapting are over."""
        super().begin(kind, index)
        if kind == "forward" and index == 0:
            self.launches.clear()
            self.bytes.clear()

    def once(self, key: Any, run: Callable[[], T], result: Callable[[], T]) -> T:
        """Every op runs, for each of them is a launch."""
        return run()

    def some(self, parts: Sequence[T]) -> Iterator[T]:
        """All parts."""
        return iter(parts)

    def launch(self, kernel: Any, operations: float) -> Callable[..., Any]:
        """Count a Triton launch."""
        name = str(getattr(kernel, "fn", kernel).__name__)

        def count(*args: Any, **options: Any) -> None:
            self.launches[name] += 1
            tensors = [x for x in args if isinstance(x, Tensor)]
            if name in MOVED:
                self.bytes[name] += sum(map(_size, MOVED[name](tensors, options)))
            elif any(map(_size, tensors)):
                raise AssertionError(f"say in MOVED what {name} reads and writes")

        return count

    def execute(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run one op, and count it if it does anything on the device."""
        result = super().execute(func, args, kwargs)
        name, kind = func._schema.name.removeprefix("aten::"), _kind(func)
        given, made = _tensors_of(args, kwargs), _tensors_of([result], {})
        device = any(tensor.is_meta for tensor in (*given, *made))
        if device and kind != "view" and name not in _ALLOCATIONS:
            self.launches[name] += 1
            self.bytes[name] += _bytes(name, kind, given, made)
        return result


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.itemsize if TOKENS in tensor.shape else 0


def _bytes(name: str, kind: str, given: list[Tensor], made: list[Tensor]) -> int:
    if "flash_attention" in name:
        return 0
    if name in _PRODUCTS and min(size for x in given if x.dim() == 2 for size in x.shape) >= _LARGE:
        return 0
    total = sum(map(_size, given))
    if kind == "in place" and name not in _WRITES_ONLY:
        return total + _size(given[0])
    return total + (sum(map(_size, made)) if kind == "pure" else 0)


def _first_layers(config: ModelConfig, count: int) -> ModelConfig:
    changes: dict[str, Any] = {"num_hidden_layers": count}
    for field in fields(config):
        value = getattr(config, field.name)
        if isinstance(value, tuple) and len(value) == config.num_hidden_layers:
            changes[field.name] = value[:count]
    return replace(config, **changes)


def _step(model: ModelConfig, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> LaunchCounter:
    ids = torch.zeros(ROWS, LENGTH, dtype=torch.int64)
    config = TrainConfig(model="m", data="d", batch_size=ROWS, max_length=LENGTH, **settings)
    monkeypatch.setattr("engine.memory.simulate.step.SimulatedMeter", LaunchCounter)
    batch = PackedBatch.of(ids, ids)
    simulate_step(model, config, [batch], gpu=True, dtype=torch.bfloat16)
    return LaunchCounter.last


def per_layer(
    preset: str, monkeypatch: pytest.MonkeyPatch, **settings: Any
) -> tuple[Counter[str], dict[str, float]]:
    """Launches of one layer, and bytes in units of tokens x hidden size x 2 bytes, by name.

    The difference of two models, of which one has a layer more.
    """
    model = preset_config(preset)
    assert model is not None
    few, many = (_step(_first_layers(model, count), monkeypatch, **settings) for count in (1, 2))
    unit = TOKENS * model.hidden_size * 2
    moved = {
        name: (size - few.bytes[name]) / unit
        for name, size in many.bytes.items()
        if size != few.bytes[name]
    }
    return many.launches - few.launches, moved
