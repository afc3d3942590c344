"""The product with a dense weight is right in either order, and for any number of rows."""

import pytest
import torch

from kernels.linear.dense import dense_product


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("rows", [1, 2, 5, 6, 16, 17])
@pytest.mark.parametrize("add", [False, True])
def test_product_is_as_exact_as_torch(dtype: torch.dtype, rows: int, add: bool) -> None:
    generator = torch.Generator().manual_seed(rows)
    x, weight = (torch.randn(n, 257, generator=generator).to(dtype) for n in (rows, 63))
    before = torch.randn(rows, 63, generator=generator).to(dtype)
    wide = torch.full((rows, 80), float("nan"), dtype=dtype)
    out = wide[:, 3:66]  # columns of a wider matrix
    out.copy_(before)
    assert dense_product(x, weight, out, add=add) is out
    truth = x.double() @ weight.double().T + (before.double() if add else 0.0)
    plain = torch.addmm(before, x, weight.T) if add else x @ weight.T
    bound = 2 * (plain.double() - truth).abs().max() + torch.finfo(dtype).eps * truth.abs().max()
    assert (out.double() - truth).abs().max() <= bound
    assert wide[:, :3].isnan().all()
    assert wide[:, 66:].isnan().all()
