"""Loops that numba compiles for a CPU give the bits of the torch ops they stand for."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels.elementwise.rms_norm import (
    add_rms_norm_forward,
    rms_norm_backward,
    rms_norm_forward,
)
from kernels.elementwise.rope import rope_qk_
from kernels.elementwise.swiglu import swiglu_backward_, swiglu_forward
from kernels.nf4 import BLOCK_SIZES, NF4Weight, dequantize, quantize
from kernels.nf4.decode import dequantize_rows
from kernels.nf4.decode_compiled import compiled_loop, wide_permutes
from kernels.runtime.cores import compiles_loops, over_cores
from kernels.runtime.lanes import takes_lanes
from optim import AdamW8bit
from tests.engine.memory.test_meter import planned_and_measured

pytestmark = pytest.mark.interop

Made = Callable[[Tensor, Tensor, Tensor], dict[str, Tensor]]
"""bf16 x, y (N, H) and w (H,) to what ops make of them."""


def in_torch(weight: NF4Weight, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    with monkeypatch.context() as patch:
        patch.setenv("ENGINE_REFERENCE", "1")
        return dequantize(weight, dtype)


def test_numba_is_here() -> None:
    assert compiles_loops()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("shape", [(1,), (63,), (65,), (257, 3), (576, 192), (1031, 2001)])
def test_decoded_bits_are_those_of_torch(
    dtype: torch.dtype,
    block_size: int,
    shape: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight = quantize(torch.randn(shape) * 0.05, block_size)
    want = in_torch(weight, dtype, monkeypatch)
    assert torch.equal(dequantize(weight, dtype), want)
    if len(shape) > 1:
        rows = slice(shape[0] // 3, shape[0] - 1)
        assert torch.equal(dequantize_rows(weight, rows.start, rows.stop, dtype), want[rows])


@pytest.mark.parametrize("narrow", [False, True])
def test_a_tree_of_selects_gives_the_bits_of_a_permute(
    narrow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What runs on a processor without AVX-512, on any."""
    weight = quantize(torch.randn(64, 640) * 0.05, double_quant=False)
    dtype = torch.bfloat16 if narrow else torch.float32
    for permutes in {False, wide_permutes()}:
        out = torch.full(weight.shape, torch.nan, dtype=dtype)
        loop = compiled_loop(narrow, permutes)
        loop(weight.packed.data_ptr(), out.data_ptr(), weight.absmax.numpy(), 32)
        assert torch.equal(out, in_torch(weight, dtype, monkeypatch))


def test_every_element_is_in_one_part() -> None:
    seen = torch.zeros(1000, dtype=torch.int64)

    def part(begin: int, end: int) -> None:
        seen[begin:end] += 1

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        over_cores(1000, 1, part)
        over_cores(2, 1, part)
    finally:
        torch.set_num_threads(threads)
    assert seen.tolist() == [2, 2, *([1] * 998)]


SHAPES = [(1, 4096), (4097,), (300, 77), (1024, 1024), (16,), (5000,)]


def optimizers(
    steps: int, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype = torch.float32
) -> tuple[tuple[AdamW8bit, list[Tensor]], ...]:
    """The compiled loop and torch's ops after the same steps, two of them on a part."""
    start = [torch.randn(shape).mul_(0.05).to(dtype) for shape in SHAPES]
    sides = []
    for _ in range(2):
        params = [p.clone().requires_grad_() for p in start]
        sides.append((AdamW8bit(params, lr=1e-3, weight_decay=0.1), params))
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        grads = [
            torch.randn(shape, generator=generator).mul_(10.0 ** -(step % 5)).to(dtype)
            for shape in SHAPES
        ]
        grads[1].zero_()
        for side, (optimizer, params) in enumerate(sides):
            for p, g in zip(params, grads, strict=True):
                p.grad = g
            params[-1].grad = None if step % 2 else params[-1].grad
            with monkeypatch.context() as patch:
                if side:
                    patch.setenv("ENGINE_REFERENCE", "1")
                only = tuple(range(3)) if step == 2 else None
                optimizer.step(
                    grad_scale=0.5, max_norm=1.0 if step == 3 else float("inf"), only=only
                )
    return tuple(sides)


def test_the_compiled_step_leaves_the_codes_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    (ours, params), (theirs, others) = optimizers(7, monkeypatch)
    for name, tensor in ours.state_tensors().items():
        assert torch.equal(tensor, theirs.state_tensors()[name]), name
    for p, q in zip(params, others, strict=True):
        assert torch.allclose(p, q, rtol=3e-7, atol=1e-8)


def test_the_compiled_step_keeps_the_accuracy_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first step from zero moments, against float64."""
    lr, decay, eps, b1, b2 = 1e-3, 0.1, 1e-8, 0.9, 0.999
    w, g = torch.randn(300, 77).mul_(0.05), torch.randn(300, 77)
    m, v = (1 - b1) * g.double(), (1 - b2) * g.double() ** 2
    update = lr / (1 - b1) * m / ((v / (1 - b2)).sqrt() + eps)
    truth = w.double() * (1 - lr * decay) - update
    errors = []
    for reference in ("0", "1"):
        p = w.clone().requires_grad_()
        p.grad = g
        with monkeypatch.context() as patch:
            patch.setenv("ENGINE_REFERENCE", reference)
            AdamW8bit([p], lr=lr, weight_decay=decay).step()
        errors.append(float((p.detach().double() - truth).abs().max()))
    assert errors[0] <= 2 * errors[1] + torch.finfo(torch.float32).eps * float(truth.abs().max())


def test_bf16_parameters_take_the_ops_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    (_, params), (_, others) = optimizers(3, monkeypatch, torch.bfloat16)
    for p, q in zip(params, others, strict=True):
        assert torch.equal(p, q)


ROWS, WIDTH = 300, 576
"""More elements than `LEAST_ELEMENTS`, and rows that no part divides evenly."""


def bf16(*shape: int) -> Tensor:
    return torch.randn(shape).to(torch.bfloat16)


def norms(x: Tensor, y: Tensor, w: Tensor) -> dict[str, Tensor]:
    wide = bf16(*x.shape).repeat(1, 2)[:, : x.shape[1]].copy_(y)  # rows lie apart
    normed, rstd = rms_norm_forward(x, w, 1e-5)
    added, total, _ = add_rms_norm_forward(x, y.clone(), w, 1e-5, total=wide)
    dx, _ = rms_norm_backward(y, x, w, rstd)
    through, _ = rms_norm_backward(y, x, w, rstd, dresidual=wide, out=y.clone())
    return {"normed": normed, "added": added, "total": total, "dx": dx, "through": through}


def swiglus(x: Tensor, y: Tensor, w: Tensor) -> dict[str, Tensor]:
    gate, up = torch.cat((3 * x, y), 1).split(x.shape[1], 1)
    h = swiglu_forward(gate, up)
    made = {"h": h, "into": swiglu_forward(gate, up, out=bf16(*x.shape))}
    for keep in (False, True):
        dh = y + 1
        d_gate, d_up = swiglu_backward_(dh, gate.clone(), up.clone(), keep_h=keep)
        made |= {f"d_gate {keep}": d_gate, f"d_up {keep}": d_up, f"dh {keep}": dh}
    return made


def rotations(x: Tensor, y: Tensor, w: Tensor) -> dict[str, Tensor]:
    angle = torch.arange(x.shape[0] * 32.0).view(-1, 32)
    made = {}
    for inverse in (False, True):
        whole = torch.cat((x, y), 1)
        q, k = (part.unflatten(1, (-1, 64)) for part in whole.split((768, 384), 1))
        rope_qk_(q, k, angle.cos(), angle.sin(), inverse=inverse)
        made[f"rotated {inverse}"] = whole
    return made


@pytest.mark.parametrize("made", [norms, swiglus, rotations])
def test_loops_over_bf16_rows_round_as_torch_does(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nearly all bits are the same; the others are one unit of the last place apart."""
    x, y, w = bf16(ROWS, WIDTH), bf16(ROWS, WIDTH), bf16(WIDTH)
    torch.manual_seed(1)
    mine = made(x, y, w)
    with monkeypatch.context() as patch:
        patch.setenv("ENGINE_REFERENCE", "1")
        torch.manual_seed(1)
        theirs = made(x, y, w)
    for name, value in mine.items():
        assert value.dtype == torch.bfloat16
        other = theirs[name]
        assert float((value != other).float().mean()) < 1e-3, name
        torch.testing.assert_close(value, other, rtol=2**-7, atol=1e-3)


def test_the_loops_are_taken_from_a_size_on(monkeypatch: pytest.MonkeyPatch) -> None:
    assert takes_lanes(bf16(ROWS, WIDTH))
    assert not takes_lanes(bf16(4, WIDTH))
    assert not takes_lanes(bf16(ROWS, 600))
    assert not takes_lanes(torch.randn(ROWS, WIDTH))
    assert not takes_lanes(bf16(WIDTH, ROWS).T)
    monkeypatch.setenv("ENGINE_REFERENCE", "1")
    assert not takes_lanes(bf16(ROWS, WIDTH))


def test_a_gate_that_is_no_number_stays_none() -> None:
    gate, up = bf16(ROWS, WIDTH), bf16(ROWS, WIDTH)
    gate[0, :4] = torch.tensor([torch.nan, torch.inf, 200.0, -200.0])
    h = swiglu_forward(gate, up)
    assert h[0, 0].isnan()
    assert not h[0, 1].isfinite()
    torch.testing.assert_close(
        h[0, 2:4].float(), torch.stack((200 * up[0, 2], 0 * up[0, 3])).float()
    )


@pytest.mark.parametrize("settings", ["default", "full fine-tuning", "bfloat16"])
def test_plans_of_steps_with_compiled_loops_are_exact(settings: str) -> None:
    planned_and_measured("llama", settings, [9])  # tables that a process makes once
    planned, measured = planned_and_measured("llama", settings, [107, 116, 19])
    assert planned.bytes == measured.bytes
