"""A simulated step counts the operations of the delta rule's kernels."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from engine.memory.simulate.device import ASSUMED_GPU, GPU, OnGPU
from engine.memory.simulate.simulated_meter import SimulatedMeter
from kernels.delta_net import (
    GatedDeltaInputs,
    GatedDeltaSaved,
    gated_delta_backward,
    gated_delta_forward,
)
from kernels.runtime.simulation import simulate_with


class Counter(SimulatedMeter):
    """A simulated step that sums the operations of launches alone."""

    def __init__(self) -> None:
        super().__init__(ASSUMED_GPU)
        self.launched = 0.0

    def launch(self, kernel: Any, operations: float) -> Callable[..., Any]:
        self.launched += operations
        return super().launch(kernel, operations)


def inputs(device: str | torch.device, dtype: torch.dtype, heads: int, size: int) -> Any:
    tokens, values = 512, 2 * heads
    made: dict[str, Any] = {"device": device, "dtype": dtype}
    q, k = (torch.zeros(tokens, heads, size, **made) for _ in range(2))
    v = torch.zeros(tokens, values, size, **made)
    g, beta = (torch.zeros(tokens, values, device=device) for _ in range(2))
    return GatedDeltaInputs(q, k, v, g, beta, (0, 320, tokens))


def forward_and_backward(x: GatedDeltaInputs) -> GatedDeltaSaved:
    out, _, saved = gated_delta_forward(x)
    gated_delta_backward(torch.zeros_like(out), x, saved)
    return saved


@pytest.mark.parametrize("size", [64, 128])
def test_kernels_do_about_the_operations_of_the_plain_products(size: int) -> None:
    with FlopCounterMode(display=False) as plain:
        forward_and_backward(inputs("cpu", torch.float32, 2, size))
    meter = Counter()
    with simulate_with(meter), OnGPU(), meter:
        forward_and_backward(inputs(GPU, torch.bfloat16, 2, size))
    # The kernels form some products of two chunks' tokens again where others keep them.
    assert 1.0 < meter.launched / plain.get_total_flops() < 1.4
