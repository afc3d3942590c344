"""Joint matrices of a group's adapters, and the pairs' gradients taken out of them again."""

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor

from kernels.linear import adapters as adapters_module
from kernels.linear import adapters_triton
from kernels.linear.adapters import Adapters, Gradients, pack, unpack
from kernels.linear.projection import ALIGNED, GroupLayout, Projection, layout_of

RANKS = [(8, 8, 8), (1, 3, 255), (16, 0, 4), (0, 17, 0), (64,), (4, 4, 4, 20, 4)]
OUTS = (40, 7, 130, 16, 9)
COLUMNS = 70


def group_of(ranks: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> list[Projection]:
    def projection(index: int, rank: int) -> Projection:
        out = OUTS[index]
        weight = torch.zeros(out, COLUMNS, device=device)
        if not rank:
            return Projection(weight)
        a = torch.randn(rank, COLUMNS, device=device).to(dtype).requires_grad_()
        b = torch.randn(out, rank, device=device).to(dtype).requires_grad_()
        return Projection(weight, None, a, b, scale=0.3 + index)

    return [projection(index, rank) for index, rank in enumerate(ranks)]


def joint(group: list[Projection], layout: GroupLayout) -> tuple[Tensor, Tensor]:
    """a and b in float64, one column at a time."""
    a = torch.zeros(layout.spare, COLUMNS, dtype=torch.float64)
    b = torch.zeros(layout.rows, layout.spare, dtype=torch.float64)
    low = first = 0
    for p in group:
        if p.lora_a is not None and p.lora_b is not None:
            for column in range(p.rank):
                a[low + column] = p.lora_a[column].detach().double()
                b[first : first + p.out_features, low + column] = (
                    p.scale * p.lora_b[:, column].detach().double()
                )
            low += p.rank + -p.rank % 16
        first += p.out_features
    return a, b


def empty(layout: GroupLayout, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Adapters]:
    """Uninitialised joint matrices within a wider one, as E has them."""
    whole = torch.full(
        (layout.rows + layout.spare, COLUMNS + layout.spare), torch.nan, dtype=dtype, device=device
    )
    a, b = whole[layout.rows :, :COLUMNS], whole[: layout.rows, COLUMNS:]
    return whole, Adapters(layout, a, b)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("ranks", RANKS)
def test_pairs_are_joined_with_zeros_around_them(
    ranks: tuple[int, ...], dtype: torch.dtype, way: str, device: torch.device
) -> None:
    group = group_of(ranks, torch.float32, device)
    layout = layout_of(group)
    assert layout.spare == sum(-(-rank // ALIGNED) * ALIGNED for rank in ranks)
    whole, adapters = empty(layout, dtype, device)
    pack(group, adapters)
    a, b = joint(group, layout)
    # s B is rounded once: to the nearest value of the type, from an fp32 product.
    assert torch.equal(adapters.a.cpu(), a.to(dtype))
    near = torch.finfo(dtype).eps * b.abs().to(dtype)
    assert bool(((adapters.b.cpu().double() - b).abs() <= near).all())
    assert bool((adapters.b.cpu()[b == 0] == 0).all())
    # Nothing is written left of b, above a, or in the corner that no product reads.
    assert bool(whole[: layout.rows, :COLUMNS].isnan().all())
    assert bool(whole[layout.rows :, COLUMNS:].isnan().all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("ranks", RANKS)
def test_gradients_are_the_blocks_of_the_pairs(
    ranks: tuple[int, ...], dtype: torch.dtype, way: str, device: torch.device
) -> None:
    group = group_of(ranks, torch.float32, device)
    layout = layout_of(group)
    da = torch.randn(layout.spare, COLUMNS, device=device).to(dtype)
    db = torch.randn(layout.rows, layout.spare, device=device).to(dtype)
    grads: Gradients = {}
    unpack(da, db, group, layout, grads)
    low = first = 0
    for p in group:
        if p.lora_a is not None and p.lora_b is not None:
            assert torch.equal(grads[id(p.lora_a)], da[low : low + p.rank].float())
            block = db[first : first + p.out_features, low : low + p.rank].float()
            torch.testing.assert_close(grads[id(p.lora_b)], block * p.scale, rtol=1e-6, atol=0)
            assert grads[id(p.lora_b)].is_contiguous()
            low += p.rank + -p.rank % 16
        first += p.out_features
    assert len(grads) == 2 * sum(rank > 0 for rank in ranks)


def test_only_wanted_gradients_are_given(way: str, device: torch.device) -> None:
    group = group_of((3, 5), torch.float32, device)
    assert group[0].lora_a is not None and group[1].lora_b is not None
    group[0].lora_a.requires_grad_(False)
    group[1].lora_b.requires_grad_(False)
    layout, grads = layout_of(group), Gradients()
    da = torch.randn(layout.spare, COLUMNS, device=device)
    unpack(da, torch.randn(layout.rows, layout.spare, device=device), group, layout, grads)
    assert grads.keys() == {id(group[0].lora_b), id(group[1].lora_a)}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("(own < rank)", "(own < 16)"),
        ("value = tl.load(at, mask=mine & inside, other=0.0).to(tl.float32) * scale",
         "value = tl.load(at, mask=mine & inside, other=0.0).to(tl.float32)"),
        ("column, value, mask=inside)", "column, value, mask=inside & mine)"),
    ],
)  # fmt: skip
def test_a_planted_fault_is_seen(
    old: str,
    new: str,
    triton_on: None,
    device: torch.device,
    mutant: Callable[[ModuleType, str, str], ModuleType],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    broken = mutant(adapters_triton, old, new)
    monkeypatch.setattr(adapters_module, "pack_triton", broken.pack_triton)
    with pytest.raises(AssertionError):
        test_pairs_are_joined_with_zeros_around_them((8, 8, 8), torch.float32, "triton", device)
