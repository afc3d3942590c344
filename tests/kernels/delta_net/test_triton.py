"""The Triton gated delta rule against the torch reference."""

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor

from kernels import delta_net as gated_delta
from kernels.delta_net import (
    GatedDeltaGradients,
    GatedDeltaInputs,
    GatedDeltaSaved,
    gated_delta_backward,
    gated_delta_forward,
    l2norm_forward,
)
from kernels.delta_net import backward_intra_triton as gated_delta_triton_intra
from kernels.delta_net import backward_triton as gated_delta_triton_backward
from kernels.delta_net import forward_triton as gated_delta_triton
from kernels.delta_net.forward_triton import invert
from kernels.delta_net.reference import chunk_layout, decay_matrix, in_chunks, triangular_inverse
from kernels.delta_net.tiles import MAX_SIZE, prepare, tile

BOUNDS = (0, 65, 66, 100)
TOKENS, KEY_HEADS, HEADS, KEY, VALUE = 100, 1, 2, 40, 40

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
Results = tuple[Tensor, Tensor, GatedDeltaGradients]


def inputs(device: torch.device, dtype: torch.dtype) -> Inputs:
    q = torch.randn(TOKENS, KEY_HEADS, KEY, device=device)
    k = torch.randn(TOKENS, KEY_HEADS, KEY, device=device)
    v = torch.randn(TOKENS, HEADS, VALUE, device=device)
    g = -0.3 * torch.rand(TOKENS, HEADS, device=device)
    beta = torch.rand(TOKENS, HEADS, device=device)
    return q.to(dtype), k.to(dtype), v.to(dtype), g, beta


def run(x: Inputs, do: Tensor, initial: Tensor | None, d_final: Tensor | None) -> Results:
    out, state, saved = gated_delta_forward(GatedDeltaInputs(*x, BOUNDS, initial))
    result = gated_delta_backward(do, GatedDeltaInputs(*x, BOUNDS, initial), saved, d_final)
    return out, state, result


def reference(
    x: Inputs,
    do: Tensor,
    initial: Tensor | None,
    d_final: Tensor | None,
    monkeypatch: pytest.MonkeyPatch,
) -> Results:
    """The plain torch path in fp64, from the same rounded inputs."""

    def wide(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.double()

    q, k, v, g, beta = (t.double() for t in x)
    with monkeypatch.context() as patch:
        patch.setenv("ENGINE_REFERENCE", "1")
        return run((q, k, v, g, beta), do.double(), wide(initial), wide(d_final))


def worst(result: Tensor, truth: Tensor) -> float:
    return float((result.double() - truth).abs().max())


def flat(results: Results) -> list[Tensor]:
    return [results[0], results[1], *results[2]]


def assert_within(result: Results, truth: Results, roundings: int, dtype: torch.dtype) -> None:
    """No tensor is off by more than that many roundings of its largest element."""
    for ours, exact in zip(flat(result), flat(truth), strict=True):
        allowed = roundings * torch.finfo(dtype).eps * float(exact.abs().max())
        assert worst(ours, exact) <= allowed


@pytest.mark.usefixtures("triton_on")
def test_fp32_with_states_loses_a_few_roundings(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device.type == "cuda":
        pytest.skip("fp32 takes the reference on a GPU")
    x = inputs(device, torch.float32)
    do = torch.randn(TOKENS, HEADS, VALUE)
    initial, d_final = (torch.randn(3, HEADS, KEY, VALUE) for _ in range(2))
    truth = reference(x, do, initial, d_final, monkeypatch)
    assert_within(run(x, do, initial, d_final), truth, 8, torch.float32)


@pytest.mark.usefixtures("triton_on")
def test_columns_of_one_wide_fp16_matrix_obey_the_rule_or_lose_a_few_roundings(
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    accurate: Callable[[Tensor, Tensor, Tensor], None],
) -> None:
    """The rule holds for what is fp16; sums in fp32, which plain torch feeds with fp32, are off
    by roundings of the fp16 matrices between the kernels."""
    q, k, v, g, beta = inputs(device, torch.float16)
    joined = torch.cat((q.flatten(1), k.flatten(1), v.flatten(1)), 1)
    parts = torch.split(joined, [KEY, KEY, HEADS * VALUE], 1)
    q, k, v = (part.view(TOKENS, -1, 40) for part in parts)
    x = (q, k, v, g, beta)
    do = torch.randn(TOKENS, HEADS, VALUE, device=device).half()
    truth = reference(x, do, None, None, monkeypatch)
    result = run(x, do, None, None)
    assert_within(result, truth, 4, torch.float16)
    with monkeypatch.context() as patch:
        patch.setenv("ENGINE_REFERENCE", "1")
        plain = run(x, do, None, None)
    for ours, theirs, exact in zip(flat(result), flat(plain), flat(truth), strict=True):
        if ours.dtype == torch.float16:
            accurate(ours, theirs, exact)


FAULTS = {
    gated_delta_triton: [
        ("a1 = _panel(a1, 16,", "a1 = _panel(a1, 0,"),
        ("_take(t2, 3)", "_take(t1, 3)"),
        ("(values.to(tl.float32) - read)", "values.to(tl.float32)"),
        ("state = state * tl.exp(total) +", "state = state +"),
        ("k_scale[None, :] * decay_matrix(log, 64)", "decay_matrix(log, 64)"),
        ("result *= (q_scale * tl.exp(log))[:, None]", "result *= q_scale[:, None]"),
    ],
    gated_delta_triton_backward: [
        ("decay = tl.trans(decay_matrix(", "decay = (decay_matrix("),
        ("(k_scale * tl.exp(total - log))", "(k_scale * tl.exp(log))"),
        ("d_state -= product(", "d_state += product("),
        ("matrix -= heads", "matrix -= 0"),
    ],
    gated_delta_triton_intra: [
        ("i[:, None] > i[None, :]", "i[:, None] >= i[None, :]"),
        ("tl.sum(both, 1) - tl.sum(both, 0)", "tl.sum(both, 1)"),
        ("wide *= strength[:, None]", "wide *= 1.0"),
        ("d_query += product(m,", "d_query += 0.0 * product(m,"),
        ("tl.exp(total) * tl.sum(overlap, 0)", "tl.sum(overlap, 0)"),
        ("to_state -= strength[:, None] * read", "to_state -= read"),
        ("(total - unit * along[:, None])", "(total - along[:, None])"),
    ],
}


def small(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> tuple[tuple[Inputs, Tensor, Tensor, Tensor], Results]:
    """Arguments of `run` for 70 tokens of 24 elements a head, and the truth about them."""
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    q, k, v, g, beta = (t[:70, ..., :24].contiguous() for t in inputs(device, dtype))
    states = [torch.randn(2, HEADS, 24, 24, device=device) for _ in range(2)]
    monkeypatch.setitem(globals(), "BOUNDS", (0, 65, 70))
    given = ((q, k, v, g, beta), torch.randn_like(v), states[0], states[1])
    return given, reference(*given, monkeypatch)


@pytest.mark.usefixtures("triton_on")
@pytest.mark.parametrize(
    ("module", "old", "new"),
    [(module, *fault) for module, faults in FAULTS.items() for fault in faults],
)
def test_a_planted_fault_breaks_the_tolerance(
    module: ModuleType,
    old: str,
    new: str,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    mutant: Callable[[ModuleType, str, str], ModuleType],
) -> None:
    given, truth = small(device, monkeypatch)
    changed = mutant(module, old, new)
    if module is gated_delta_triton_intra:
        for name in ("inside_chunks", "before_norm"):
            monkeypatch.setattr(gated_delta_triton_backward, name, getattr(changed, name))
    else:
        monkeypatch.setattr(gated_delta, module.__name__.rpartition(".")[2], changed)
    with pytest.raises(AssertionError):
        assert_within(run(*given), truth, 8, given[1].dtype)


@pytest.mark.usefixtures("triton_on")
def test_the_inputs_of_planted_faults_are_right_without_one(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, truth = small(device, monkeypatch)
    assert_within(run(*given), truth, 8, given[1].dtype)


@pytest.mark.usefixtures("triton_on")
def test_a_document_feels_neither_another_nor_what_was_trimmed(device: torch.device) -> None:
    x = inputs(device, torch.float16)
    do = torch.randn(TOKENS, HEADS, VALUE, device=device).half()
    own = slice(66, 100)
    results = []
    for trimmed in (False, True):
        if trimmed:
            for tensor in x:
                tensor[:66] = float("nan")
        out, state, saved = gated_delta_forward(GatedDeltaInputs(*x, BOUNDS))
        remaining = GatedDeltaSaved(saved.inverse) if trimmed else saved
        result = gated_delta_backward(do, GatedDeltaInputs(*x, BOUNDS), remaining)
        results.append((out[own], state[2], *(grad[own] for grad in result[:5])))
    for one, two in zip(*results, strict=True):
        assert torch.isfinite(one).all()
        assert torch.equal(one, two)


@pytest.mark.usefixtures("triton_on")
@pytest.mark.parametrize("case", ["random", "repeated"])
def test_the_blocked_solve_is_as_good_as_a_triangular_solve(
    device: torch.device, case: str
) -> None:
    if device.type == "cuda":
        pytest.skip("fp32 takes the reference on a GPU")
    q, k, v, g, beta = inputs(device, torch.float32)
    if case == "repeated":
        k, g, beta = k[:1].expand_as(k).contiguous(), g * 1e-3, torch.ones_like(beta)

    def solved(dtype: torch.dtype) -> Tensor:
        layout = chunk_layout(BOUNDS, 64, device)
        unit, _ = l2norm_forward(k.to(dtype))
        c = in_chunks(unit, unit, v.to(dtype), g.to(dtype), beta.to(dtype), layout)
        inverse = triangular_inverse(c, decay_matrix(c)).flatten(1, 2)
        # The layout orders chunks by their place in the document, longest document first.
        return inverse[[0, 3, 2, 1]]

    truth, plain = (solved(dtype) for dtype in (torch.float64, torch.float32))
    result = invert(prepare(GatedDeltaInputs(q, k, v, g, beta, BOUNDS)))
    for ours, theirs, exact in zip(result, plain, truth, strict=True):
        assert worst(ours, exact) <= 2 * worst(theirs, exact) + 2e-7


@pytest.mark.usefixtures("triton_on")
def test_sizes_without_a_kernel_are_refused(device: torch.device) -> None:
    q, k, v, g, beta = inputs(device, torch.float16)
    wide = torch.zeros(TOKENS, KEY_HEADS, MAX_SIZE + 1, device=device).half()
    with pytest.raises(ValueError, match="ENGINE_REFERENCE=1"):
        gated_delta_forward(GatedDeltaInputs(wide, wide, v, g, beta, BOUNDS))
    with pytest.raises(ValueError, match="chunks of 64"):
        gated_delta_forward(GatedDeltaInputs(q, k, v, g, beta, BOUNDS, chunk=32))
    with pytest.raises(RuntimeError, match=r"compute capability 8\.0"):
        tile("scan", 75, 128, 128)
