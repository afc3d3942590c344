"""The gradient between layers keeps its spare columns, and nothing else is taken for it."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels.linear.columns import Columns, copied
from kernels.linear.projection import Projection
from models.memory.checkpointing import LayerGradient


@pytest.fixture
def columns(monkeypatch: pytest.MonkeyPatch) -> Columns:
    pytest.importorskip("triton", reason="Triton is not installed on this platform")
    monkeypatch.delenv("ENGINE_REFERENCE", raising=False)
    monkeypatch.setenv("ENGINE_INTERPRET", "1")
    projection = Projection(
        torch.zeros(32, 64), None, torch.zeros(4, 64), torch.zeros(32, 4), scale=1.0
    )
    made = copied((torch.randn(6, 32),), (projection,))
    assert made.lends(16)
    return made


def test_what_left_arrives_with_its_spare_columns_once(columns: Columns) -> None:
    gradient = LayerGradient()
    dx = gradient.leave(columns)
    assert dx is not None
    assert gradient.arrive(dx) is columns
    again = gradient.arrive(dx)
    assert isinstance(again, Tensor) and torch.equal(again, dx) and again.is_contiguous()


@pytest.mark.parametrize(
    "other",
    [
        lambda dx: dx.clone(),
        lambda dx: torch.randn(6, 48)[:, :32],
        lambda dx: dx[:5],
        lambda dx: dx[:, :16],
        lambda dx: dx.double(),
    ],
)
def test_another_gradient_is_not_taken_for_it(
    other: Callable[[Tensor], Tensor], columns: Columns
) -> None:
    """As after a hook, or where a second use of the hidden states added its gradient."""
    gradient = LayerGradient()
    dx = gradient.leave(columns)
    assert dx is not None
    given = other(dx)
    taken = gradient.arrive(given)
    assert isinstance(taken, Tensor) and torch.equal(taken, given)


def test_a_plain_gradient_and_none_pass_as_they_are() -> None:
    gradient, dx = LayerGradient(), torch.randn(4, 8)
    assert gradient.leave(dx) is dx
    assert gradient.arrive(dx) is dx
    assert gradient.leave(None) is None
