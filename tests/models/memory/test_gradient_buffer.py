"""Gradients at addresses that stay."""

import torch

from models.memory.gradient_buffer import GradientBuffer


def test_gradients_of_other_memory_are_taken_over() -> None:
    first, second = (torch.nn.Parameter(torch.zeros(3)) for _ in range(2))
    buffer = GradientBuffer([first, second])
    first.grad = torch.ones(3)
    buffer.attach()
    buffer.add({id(first): torch.ones(3), id(second): torch.ones(3)})
    assert first.grad is buffer.views[id(first)]
    assert first.grad.tolist() == [2.0] * 3
    first.grad = second.grad = None
    buffer.attach()
    assert second.grad is not None
    assert second.grad.tolist() == [0.0] * 3
