"""A layer computes with the parameters it has now, however they came to change."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kernels.linear.lora import project
from kernels.nf4 import quantize
from models.layers.linear import Linear
from optim import AdamW8bit

X = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True, params=["apart", "joined"])
def adapters(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapters beside the base product, as on a CPU, and within it, as on a GPU."""
    if request.param == "joined":
        pytest.importorskip("triton", reason="Triton is not installed on this platform")
        monkeypatch.delenv("ENGINE_REFERENCE", raising=False)
        monkeypatch.setenv("ENGINE_INTERPRET", "1")


def adapted() -> tuple[Linear, Tensor]:
    """A quantised projection with a pair, and its dense weight."""
    linear = Linear(64, 32)
    weight = torch.randn(32, 64)
    linear.set_weight(quantize(weight))
    linear.lora_A = nn.Parameter(torch.randn(4, 64))
    linear.lora_B = nn.Parameter(torch.randn(32, 4))
    linear.scale = 0.5
    return linear, weight


def output(linear: Linear) -> Tensor:
    with torch.no_grad():
        return project(X, (linear.projection(),))[0].matrix.clone()


def _overwrite(linear: Linear) -> None:
    with torch.no_grad():
        for part in (linear.lora_A, linear.lora_B):
            assert part is not None
            part.mul_(1.5)


def _data(linear: Linear) -> None:
    assert linear.lora_A is not None
    linear.lora_A.data = linear.lora_A.data * 2


def _step(linear: Linear) -> None:
    pair = [p for p in (linear.lora_A, linear.lora_B) if p is not None]
    for part in pair:
        part.grad = torch.ones_like(part)
    AdamW8bit(pair, lr=0.1).step()


def _load(linear: Linear) -> None:
    state = {name: torch.randn_like(value) for name, value in linear.state_dict().items()}
    linear.load_state_dict(state)


def _replace(linear: Linear) -> None:
    linear.lora_B = nn.Parameter(torch.randn(32, 4))


def _rank(linear: Linear) -> None:
    linear.lora_A, linear.lora_B = (
        nn.Parameter(torch.randn(9, 64)),
        nn.Parameter(torch.randn(32, 9)),
    )


def _number(linear: Linear) -> None:
    linear.scale = 2.0


def _weight(linear: Linear) -> None:
    linear.set_weight(quantize(torch.randn(32, 64)))


CHANGES: list[Callable[[Linear], Any]] = [
    _overwrite, _data, _step, _load, _replace, _rank, _number, _weight
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen_by_the_next_product(change: Callable[[Linear], Any]) -> None:
    linear, _ = adapted()
    before = output(linear)
    assert torch.equal(output(linear), before)
    change(linear)
    after = output(linear)
    assert not torch.allclose(after, before)
    fresh = Linear(64, 32)
    fresh.set_weight(linear.weight)
    fresh.lora_A, fresh.lora_B, fresh.scale = linear.lora_A, linear.lora_B, linear.scale
    assert torch.equal(output(fresh), after)


def test_the_weight_before_is_freed() -> None:
    """Weights that are streamed from the host would stay on the device otherwise."""
    linear, _ = adapted()
    first = linear.projection()
    assert linear.projection() is first
    linear.set_weight(quantize(torch.randn(32, 64)))
    assert all(value is not first for value in vars(linear).values())
