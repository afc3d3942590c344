"""The choice between the two NF4 products is a table."""

from __future__ import annotations

import pytest

from kernels.nf4 import tiles as tiling
from kernels.nf4.tiles import DISPATCH, MatmulPlan, MatmulTile, matmul_plan, override, slab, split_k

H200 = (90, 132)
LLAMA = [(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)]


@pytest.mark.parametrize(("n", "k"), LLAMA)
@pytest.mark.parametrize(
    ("arch", "largest"), [(80, 128), (86, 128), (89, 256), (90, 128), (100, 16), (120, 256)]
)
def test_small_products_are_fused_and_large_ones_not(
    arch: int, largest: int, n: int, k: int
) -> None:
    for m in (1, 2, 16, largest):
        assert matmul_plan(arch, 100, m, n, k).tile is not None
    for m in (largest + 1, 2048, 16384):
        assert matmul_plan(arch, 100, m, n, k) == MatmulPlan(None)


def test_a_plan_takes_the_tile_with_the_smallest_sufficient_bound() -> None:
    tiles = [matmul_plan(*H200, m, 4096, 4096).tile for m in (1, 16, 17, 64)]
    assert [tile.block_m for tile in tiles if tile] == [16, 16, 64, 64]


def test_rows_without_whole_blocks_and_turing_are_never_fused() -> None:
    assert matmul_plan(*H200, 1, 4096, 4100).tile is None
    assert matmul_plan(75, 40, 1, 4096, 4096).tile is None


@pytest.mark.parametrize(("arch", "like"), [(87, 86), (103, 100), (121, 120), (999, 120)])
def test_an_unlisted_architecture_takes_the_nearest_older_rows(arch: int, like: int) -> None:
    for m in (1, 64, 4096):
        assert matmul_plan(arch, 100, m, 512, 512) == matmul_plan(like, 100, m, 512, 512)


def test_exact_rows_win_and_leave_with_the_context() -> None:
    before = dict(DISPATCH)
    special = MatmulTile(64, 32, 4, 2)
    with override({(90, 512, 4096, 4096): special, (90, 8, 0, 4096): None}):
        assert matmul_plan(*H200, 300, 4096, 4096).tile == special
        assert matmul_plan(*H200, 4, 4096, 4096).tile == special
        assert matmul_plan(*H200, 4, 1024, 4096).tile is None
        assert matmul_plan(*H200, 300, 1024, 4096).tile is None
    assert before == DISPATCH
    with pytest.raises(RuntimeError), override({(90, 1, 1, 1): None}):
        raise RuntimeError
    assert before == DISPATCH


def test_reduction_is_split_only_until_the_device_is_full() -> None:
    assert split_k(tiles=1000, multiprocessors=132, blocks=64) == 1
    for tiles in (1, 8, 32, 112, 263):
        for blocks in (1, 8, 64, 224):
            parts = split_k(tiles, 132, blocks)
            assert parts & (parts - 1) == 0
            assert parts == 1 or tiles * parts <= 132 * 4
            assert parts == 1 or blocks // parts >= 4
    assert split_k(tiles=32, multiprocessors=132, blocks=64) == 16


def test_slabs_are_whole_without_a_limit_and_within_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert slab(90, 14336, 8192, 64) == 14336
    monkeypatch.setitem(tiling.SLAB_BYTES, 90, 24 << 20)
    lines = slab(90, 14336, 8192, 64)
    assert lines * 8192 <= 24 << 20
    assert lines % 64 == 0
    assert slab(90, 100, 8192, 64) == 100
    assert slab(90, 14336, 1 << 30, 64) == 64


def test_every_tile_a_plan_can_return_is_listed_for_the_compile_report() -> None:
    for arch in (80, 86, 89, 90, 100, 120):
        plans = [matmul_plan(arch, 100, m, 4096, 4096) for m in range(1, 600)]
        assert {plan.tile for plan in plans if plan.tile} <= set(tiling.matmul_tiles(arch))
    sizes = [2**i for i in range(32)]
    used = {tiling.dequantize_tile(sms, size) for sms in (1, 24, 132) for size in sizes}
    assert used == set(tiling.dequantize_tiles())
    used = {tiling.transposed_tile(sms, size) for sms in (1, 24, 132) for size in sizes}
    assert used == set(tiling.transposed_tiles())
