"""Projections that share an input: values, every gradient, planted faults."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernels.elementwise.dropout import Seed
from kernels.linear import lora_backward as lora_module
from kernels.linear.columns import output_columns
from kernels.linear.decode import decode, decode_weight
from kernels.linear.dora import adapted_row_norms
from kernels.linear.int8 import dequantize_int8, quantize_int8
from kernels.linear.lora import lora_linear, lora_qkv, project, project_backward
from kernels.linear.projection import Projection
from kernels.linear.swiglu_mlp import lora_mlp
from kernels.nf4 import dequantize, quantize
from kernels.nf4.matmul import fused_pays
from kernels.nf4.planar import PlanarNF4Weight, to_planar

G = torch.Generator().manual_seed(0)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=G)


def projection(
    inputs: int, outputs: int, rank: int = 3, *, bias: bool = False, train_base: bool = False
) -> Projection:
    return Projection(
        randn(outputs, inputs).requires_grad_(train_base),
        randn(outputs).requires_grad_(True) if bias else None,
        randn(rank, inputs).requires_grad_(True) if rank else None,
        randn(outputs, rank).requires_grad_(True) if rank else None,
        scale=0.7,
    )


def textbook(x: Tensor, p: Projection) -> Tensor:
    assert isinstance(p.weight, Tensor)
    y = x @ p.weight.T
    if p.bias is not None:
        y = y + p.bias
    if p.lora_a is not None and p.lora_b is not None:
        y = y + p.scale * (x @ p.lora_a.T) @ p.lora_b.T
    return y


@pytest.mark.parametrize("rows", [1, 63, 257])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rank", [0, 3])
def test_linear_equals_the_textbook_in_values_and_gradients(
    rows: int, bias: bool, rank: int
) -> None:
    x, p = randn(rows, 10).requires_grad_(True), projection(10, 7, rank, bias=bias, train_base=True)
    got, want = lora_linear(x, p), textbook(x, p)
    assert torch.allclose(got, want, rtol=1e-12, atol=1e-12)
    dy = randn(rows, 7)
    leaves = [x, *p.trainable()]
    for mine, theirs in zip(
        torch.autograd.grad(got, leaves, dy), torch.autograd.grad(want, leaves, dy), strict=True
    ):
        assert torch.allclose(mine, theirs, rtol=1e-10, atol=1e-10)


def test_linear_qkv_and_mlp_pass_gradcheck() -> None:
    x = randn(5, 6).requires_grad_(True)
    p = projection(6, 4, bias=True, train_base=True)
    assert torch.autograd.gradcheck(lambda x, *_: lora_linear(x, p), (x, *p.trainable()))
    group = (projection(6, 4), projection(6, 2, 2), projection(6, 2, 0, train_base=True))
    leaves = [t for q in group for t in q.trainable()]
    assert torch.autograd.gradcheck(lambda x, *_: lora_qkv(x, *group), (x, *leaves))
    mlp = (projection(6, 8), projection(6, 8, bias=True), projection(8, 6))
    leaves = [t for q in mlp for t in q.trainable()]
    assert torch.autograd.gradcheck(lambda x, *_: lora_mlp(x, *mlp), (x, *leaves))


def test_dropout_is_the_same_mask_in_both_directions() -> None:
    x = randn(9, 6).requires_grad_(True)
    p = Projection(randn(4, 6), None, randn(2, 6).requires_grad_(True), randn(4, 2), 1.0, 0.4)
    p.lora_b.requires_grad_(True)  # type: ignore[union-attr]
    assert torch.autograd.gradcheck(lambda x, *_: lora_linear(x, p, Seed(11)), (x, *p.trainable()))
    assert not torch.equal(lora_linear(x, p, Seed(11)), lora_linear(x, p, Seed(12)))


@pytest.mark.parametrize(
    ("encode", "decode"), [(quantize, dequantize), (quantize_int8, dequantize_int8)]
)
def test_quantised_weights_compute_as_their_decoded_values(
    encode: Callable[[Tensor], object], decode: Callable[..., Tensor]
) -> None:
    x = randn(11, 128).float().requires_grad_(True)
    dense = [randn(o, 128).float() for o in (64, 32, 32)]
    packed = [encode(w) for w in dense]
    q, k, v = (Projection(w) for w in packed)  # type: ignore[arg-type]
    plain = [Projection(decode(w, torch.float32)) for w in packed]
    got, want = lora_qkv(x, q, k, v), lora_qkv(x, plain[0], plain[1], plain[2])
    dys = [randn(11, o).float() for o in (64, 32, 32)]
    for mine, theirs in zip(got, want, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-5, atol=1e-5)
    (dx,) = torch.autograd.grad(got, x, dys)
    (dx_plain,) = torch.autograd.grad(want, x, dys)
    assert torch.allclose(dx, dx_plain, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("ranks", [(3, 3, 3), (5, 0, 2)])
@pytest.mark.parametrize("dora", [False, True])
def test_adapters_inside_the_base_product_give_the_same_values_and_gradients(
    dora: bool, ranks: tuple[int, ...], dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a GPU does: one product for base and adapters, in either direction."""
    x, seed = randn(9, 128).float(), Seed(11) if dropout else None

    def adapted(out: int, rank: int) -> Projection:
        a = randn(rank, 128).float().requires_grad_(True) if rank else None
        b = randn(out, rank).float().requires_grad_(True) if rank else None
        bias = randn(out).float().requires_grad_(True)
        m = torch.rand(out).add_(0.5).requires_grad_(True) if rank and dora else None
        return Projection(quantize(randn(out, 128).float()), bias, a, b, 0.7, dropout, m)

    group = [adapted(out, rank) for out, rank in zip((64, 32, 32), ranks, strict=True)]
    given = [randn(9, out).float() for out in (64, 32, 32)]
    outcome = []
    for extend in (False, True):
        if extend:
            monkeypatch.setenv("ENGINE_INTERPRET", "1")
        grads: dict[int, Tensor] = {}
        with torch.no_grad():
            ys, saved = project(x, group, seed)
            decoded = decode(group, x.dtype)
            assert (decoded.extended is not None) == extend
            dys = output_columns(9, group, x)
            for part, dy in zip(dys, given, strict=True):
                part.copy_(dy)
            dx = project_backward(dys, x, group, grads, seed=seed, saved=saved, decoded=decoded)
        assert dx is not None
        assert dys.lends(1) == extend
        outcome.append([*ys, dx, *(grads[id(t)] for p in group for t in p.trainable())])
    for apart, together in zip(*outcome, strict=True):
        assert torch.allclose(apart, together, rtol=2e-4, atol=2e-4)


def test_dora_equals_the_textbook_with_a_constant_norm() -> None:
    """Values against the textbook; gradients as in the paper, where the norm is a constant."""
    x = randn(7, 6).requires_grad_(True)
    plain = projection(6, 4, bias=True, train_base=True)
    m = (randn(4).abs() + 0.5).requires_grad_(True)
    p = replace(plain, magnitude=m)
    assert isinstance(p.weight, Tensor)
    assert p.lora_a is not None
    assert p.lora_b is not None
    norm = (p.weight + p.scale * p.lora_b @ p.lora_a).norm(dim=1).detach()
    want = (m / norm) * (textbook(x, replace(plain, bias=None))) + p.bias
    got = lora_linear(x, p)
    assert torch.allclose(got, want, rtol=1e-10)
    leaves, dy = [x, *p.trainable()], randn(7, 4)
    assert len(leaves) == 6
    for mine, theirs in zip(
        torch.autograd.grad(got, leaves, dy), torch.autograd.grad(want, leaves, dy), strict=True
    ):
        assert torch.allclose(mine, theirs, rtol=1e-8, atol=1e-10)


def test_dora_leaves_rows_of_zeros_as_they_are() -> None:
    """A pruned row has no direction: it gives 0, and nothing that would bring it back moves."""
    x, p = randn(7, 6), projection(6, 4)
    assert isinstance(p.weight, Tensor) and p.lora_a is not None and p.lora_b is not None
    with torch.no_grad():
        p.weight[1].zero_()
        p.lora_b[1].zero_()
    m = adapted_row_norms(p.weight, p.lora_a, p.lora_b, p.scale).detach().requires_grad_(True)
    assert float(m[1].detach()) == 0.0
    y = lora_linear(x, replace(p, magnitude=m))
    y.sum().backward()
    assert bool((y[:, 1] == 0).all())
    assert m.grad is not None and p.lora_b.grad is not None
    assert float(m.grad[1]) == 0.0 and bool((p.lora_b.grad[1] == 0).all())
    assert bool((m.grad[[0, 2, 3]] != 0).all()) and bool(torch.isfinite(p.lora_b.grad).all())


def test_int8_rows_are_within_half_a_step() -> None:
    w = torch.cat((randn(70, 33).float(), torch.zeros(1, 33)))
    packed = quantize_int8(w)
    error = (dequantize_int8(packed) - w).abs()
    assert bool((error <= w.abs().amax(1, keepdim=True) / 254 + 1e-6).all())
    assert packed.nbytes == w.numel() + 4 * 71


def test_backward_saves_no_dequantised_weight() -> None:
    x = randn(4, 128).float().requires_grad_(True)
    p = Projection(quantize(randn(256, 128).float()))
    saved: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        lora_linear(x, p)
    assert max(saved) < 256 * 128 / 4


@torch.no_grad()
def test_a_wrong_scale_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison with the textbook sees a planted fault."""
    x, p = randn(5, 6), projection(6, 4)
    honest = project(x, (p,))[0][0]
    monkeypatch.setattr(lora_module, "_stacked_a", lambda ps, dtype: ps[0].lora_a * 1.01)
    assert not torch.allclose(project(x, (p,))[0][0], honest)
    assert torch.allclose(honest, textbook(x, p))


@pytest.mark.parametrize("missing", [False, True])
def test_a_small_adapter_is_not_rounded_away_in_16_bits(missing: bool) -> None:
    """Added to a rounded product, what is under half a unit in the last place would vanish."""

    def narrow(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=G).bfloat16()

    rows, width, rank = 96, 256, 4
    x = narrow(rows, width)
    group = tuple(
        Projection(
            narrow(width, width),
            None,
            None if missing and index == 0 else narrow(rank, width),
            None if missing and index == 0 else narrow(width, rank) * 2.0**-11,
        )
        for index in range(2)
    )
    ys, _ = project(x, group)
    for y, p in zip(ys.parts, group, strict=True):
        assert isinstance(p.weight, Tensor)
        base = x.double() @ p.weight.double().T
        if p.lora_a is None or p.lora_b is None:
            assert torch.allclose(y.double(), base, rtol=2**-8, atol=0.1)
            continue
        part = x.double() @ p.lora_a.double().T @ p.lora_b.double().T
        assert part.std() < 2.0**-8 * base.std()
        share = float(((y.double() - base) * part).sum() / part.square().sum())
        assert abs(share - 1.0) < 0.2
    dys = [narrow(rows, width) for _ in group]
    dx = project_backward(dys, x, group, {})
    assert dx is not None
    base, part = torch.zeros(rows, width).double(), torch.zeros(rows, width).double()
    for dy, p in zip(dys, group, strict=True):
        assert isinstance(p.weight, Tensor)
        base += dy.double() @ p.weight.double()
        if p.lora_a is not None and p.lora_b is not None:
            part += dy.double() @ p.lora_b.double() @ p.lora_a.double()
    share = float(((dx.double() - base) * part).sum() / part.square().sum())
    assert abs(share - 1.0) < 0.2


def test_a_small_adapter_survives_the_product_that_reads_codes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Few rows on a GPU; in float16, for the interpreter cuts bfloat16 off."""
    pytest.importorskip("triton", reason="Triton is not installed on this platform")
    monkeypatch.setenv("ENGINE_INTERPRET", "1")
    rows, width = 48, 128
    x = torch.randn(rows, width, generator=G).half()
    group = tuple(
        Projection(
            to_planar(quantize(torch.randn(out, width, generator=G))),
            None,
            torch.randn(4, width, generator=G),
            torch.randn(out, 4, generator=G) * 2.0**-14,
        )
        for out in (128, 64)
    )
    assert all(isinstance(p.weight, PlanarNF4Weight) and fused_pays(x, p.weight) for p in group)
    with torch.no_grad():
        ys, _ = project(x, group)
    for y, p in zip(ys.parts, group, strict=True):
        assert p.lora_a is not None and p.lora_b is not None
        assert isinstance(p.weight, PlanarNF4Weight)
        base = x.double() @ decode_weight(p.weight, torch.float32).half().double().T
        part = x.double() @ p.lora_a.double().T @ p.lora_b.double().T
        assert part.std() < 2.0**-11 * base.std()
        share = float(((y.double() - base) * part).sum() / part.square().sum())
        assert abs(share - 1.0) < 0.2
