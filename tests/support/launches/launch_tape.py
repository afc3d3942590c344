"""CUDA graphs acted out on a CPU, to show without a GPU that recorded launches may be repeated.

A `LaunchTape` records what a function does to tensors: every operation torch dispatches and every
Triton kernel the interpreter runs, with the tensors and the numbers it was given. Repeating it does
the same operations on the same memory with the same numbers. What a CUDA graph would get wrong is
then wrong here: a number that the host worked out for an earlier batch, a tensor at a new address.
As with a graph, recording leaves no trace: memory from before is put back, and memory that was made
on the way is filled with NaN, also whenever it would be uninitialised. An operation whose result
the host must wait for cannot be recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2")
_EMPTY = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _spoil(tensor: Tensor) -> None:
    """What uninitialised memory holds."""
    tensor.fill_(torch.nan if tensor.is_floating_point() else 1 << 6)


class _Tape(TorchDispatchMode):
    """The operations of one recording."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Callable[[], None]] = []
        self.made: dict[int, Tensor] = {}
        self._before: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given, options = (args, kwargs or {}), kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        if name in WAITS:
            raise RuntimeError(f"{name} makes the host wait and cannot be recorded")
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self.note(_tensors(value))
        if "out" in options:
            self.note(_tensors(options["out"]))
        known = {_storage(tensor) for tensor in _tensors(given)}
        result = func(*args, **options)
        fresh = [tensor for tensor in _tensors(result) if _storage(tensor) not in known]
        for tensor in fresh:
            self.made[_storage(tensor)] = tensor
        if name in _EMPTY:
            for tensor in fresh:
                _spoil(tensor)
                self.steps.append(partial(_spoil, tensor))
        elif fresh or func._schema.is_mutable:
            self.steps.append(partial(_again, func, args, options, result))
        return result

    def note(self, written: list[Tensor]) -> None:
        """Remember what these hold, unless they were made here."""
        for tensor in written:
            address = _storage(tensor)
            if address not in self.made and address not in self._before:
                whole = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
                self._before[address] = (whole, whole.clone())

    def launch(self, kernel: Callable[..., Any], args: Any, options: Any) -> None:
        """Record and do one launch of a Triton kernel."""
        self.steps.append(partial(kernel, *args, **options))
        # Copies made here and by the interpreter are no part of the launch.
        with _disable_current_modes():
            self.note(_tensors((args, options)))
            kernel(*args, **options)

    def leave_no_trace(self) -> None:
        """As if nothing had been done yet."""
        for whole, before in self._before.values():
            whole.copy_(before)
        self._before.clear()
        for tensor in self.made.values():
            _spoil(tensor)


def _again(func: Any, args: Any, options: Any, first: Any) -> None:
    """Do an operation again; results of their own memory go where the first ones lie."""
    for old, new in zip(_tensors(first), _tensors(func(*args, **options)), strict=True):
        if _storage(old) != _storage(new):
            old.copy_(new)


class LaunchTape:
    """A recorder for `models.memory.cuda_graphs.LayerGraphs`."""

    def __init__(self) -> None:
        self.recordings: list[_Tape] = []
        self._current: _Tape | None = None

    def warm_up(self, body: Callable[[], None]) -> None:
        """Run `body`."""
        body()

    def record(self, body: Callable[[], None]) -> Callable[[], None]:
        """What repeats the operations of `body`. Raises `RuntimeError` if the host would wait."""
        tape = _Tape()
        self._current = tape
        with torch.no_grad(), tape:
            body()
        self._current = None
        tape.leave_no_trace()
        self.recordings.append(tape)

        def replay() -> None:
            with torch.no_grad():
                for step in tape.steps:
                    step()

        return replay

    @contextmanager
    def kernels(self) -> Iterator[None]:
        """Triton kernels that the interpreter runs are recorded too."""
        from triton.runtime.interpreter import InterpretedFunction

        plain = InterpretedFunction.__getitem__

        def launcher(kernel: Any, grid: Any) -> Callable[..., Any]:
            launch: Callable[..., Any] = plain(kernel, grid)

            def recorded(*args: Any, **options: Any) -> None:
                if self._current is None:
                    launch(*args, **options)
                else:
                    self._current.launch(launch, args, options)

            return recorded

        InterpretedFunction.__getitem__ = launcher
        try:
            yield
        finally:
            del InterpretedFunction.__getitem__  # it was and is inherited
