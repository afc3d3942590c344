"""The GPU's attention back ends, tested without a GPU.

torch's CUDA functions are given CPU implementations here, written from their documented meaning and
called through torch's dispatcher, which checks every argument against the installed schema. So the
order of arguments, layouts, masks, groups of heads and what is kept for backward are proven; speed,
and that CUDA's functions mean what is written here, are not. That last is tried at run time.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from kernels.attention import (
    AttentionPlan,
    AttentionSettings,
    attention,
    attention_backward,
    attention_forward,
    backends,
    choice,
    hopper,
)
from kernels.attention.choice import TrialKind, explain, select, trial
from kernels.attention.table import BACKENDS
from tests.support.launches.attention_emulation import Emulation

CPU = torch.device("cpu")
WHOLE_BATCH = (128, 128)
PACKED = (5, 130, 61)


def plan_of(lengths: tuple[int, ...]) -> AttentionPlan:
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return AttentionPlan.from_cu_seqlens(bounds, int(bounds[-1]))


@pytest.fixture
def emulated() -> Iterator[Emulation]:
    emulation = Emulation()
    functions = {
        "_flash_attention_forward": emulation.flash_forward,
        "_flash_attention_backward": emulation.flash_backward,
        "_efficient_attention_forward": emulation.efficient_forward,
        "_efficient_attention_backward": emulation.efficient_backward,
        "_scaled_dot_product_cudnn_attention": emulation.cudnn_forward,
        "_scaled_dot_product_cudnn_attention_backward": emulation.cudnn_backward,
        "_cudnn_attention_forward": emulation.cudnn_varlen_forward,
        "_cudnn_attention_backward": emulation.cudnn_varlen_backward,
    }
    trial.cache_clear()
    with torch.library._scoped_library("aten", "IMPL") as library:
        for name, function in functions.items():
            library.impl(name, function, "CPU")
        yield emulation
    trial.cache_clear()


def kind(
    dtype: torch.dtype = torch.bfloat16, windowed: bool = False, open_: bool = False
) -> TrialKind:
    return TrialKind(CPU, dtype, 4, 2, 32, windowed, open_)


@pytest.mark.parametrize(
    ("backend", "lengths", "window"),
    [
        ("flash", PACKED, None),
        ("flash", PACKED, 17),
        ("flash", PACKED, 130),
        ("efficient", PACKED, None),
        ("efficient", PACKED, 17),
        ("cudnn_varlen", PACKED, None),
        ("cudnn_varlen", (1,) * 9 + PACKED, None),
        ("cudnn", WHOLE_BATCH, None),
        ("cudnn", WHOLE_BATCH, 128),
    ],
)
@pytest.mark.parametrize("strided", [False, True])
def test_a_back_end_is_called_as_its_schema_says(
    backend: str,
    lengths: tuple[int, ...],
    window: int | None,
    strided: bool,
    emulated: Emulation,
) -> None:
    plan, tokens = plan_of(lengths), sum(lengths)
    joined = torch.randn(tokens, 8 * 32)
    q, k, v = (x.unflatten(1, (-1, 32)) for x in joined.split((128, 64, 64), 1))
    if not strided:
        q, k, v = (x.contiguous() for x in (q, k, v))
    do = torch.randn(tokens, 4, 32)
    results = []
    for name in (backend, "documents"):
        leaves = [x.detach().requires_grad_(True) for x in (q, k, v)]
        out = attention(leaves[0], leaves[1], leaves[2], plan, window=window, backend=name)
        assert out.is_contiguous()
        results.append([out.detach(), *torch.autograd.grad(out, leaves, do)])
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)
    assert emulated.calls == [f"{backend}_forward", f"{backend}_backward"]


@pytest.mark.parametrize("windowed", [False, True])
@pytest.mark.parametrize("name", ["flash", "efficient"])
def test_a_trial_accepts_what_is_right(name: str, windowed: bool, emulated: Emulation) -> None:
    for open_ in (False, True):
        assert trial(name, kind(windowed=windowed, open_=open_)) == "ok"


@pytest.mark.parametrize("pitches", [(256 + 24, 256 + 24), (128, 64 + 8), (300, 96)])
def test_a_trial_has_the_layout_of_the_layers_projections(
    pitches: tuple[int, int], emulated: Emulation, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    right = BACKENDS["flash"]

    def looks(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, settings: AttentionSettings):  # type: ignore[no-untyped-def]
        seen.append((q.stride(0), k.stride(0), v.stride(0), settings.plan.bounds))
        return right.forward(q, k, v, settings)

    monkeypatch.setitem(BACKENDS, "flash", dataclasses.replace(right, forward=looks))
    laid_out = dataclasses.replace(kind(), pitches=pitches)
    assert trial("flash", laid_out) == "ok"
    ((q, k, v, bounds),) = seen
    assert (q, k, v) == (pitches[0], pitches[1], pitches[1])
    lengths = [b - a for a, b in itertools.pairwise(bounds)]
    assert min(lengths) == 1
    assert max(lengths) > 128
    assert len(set(lengths)) == len(lengths)


def test_the_layout_of_a_problem_is_part_of_what_is_tried(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tried: list[TrialKind] = []

    def note(name: str, kind: TrialKind) -> str:
        tried.append(kind)
        return "ok"

    monkeypatch.setattr(choice, "trial", note)
    joined = torch.zeros(sum(PACKED), 8 * 64 + 16, dtype=torch.bfloat16)
    q, k, _ = joined[:, : 8 * 64].split((256, 128, 128), 1)
    settings = AttentionSettings(plan_of(PACKED), None, 1.0)
    select(q.unflatten(1, (-1, 64)), k.unflatten(1, (-1, 64)), settings)
    assert tried[0].pitches == (528, 528)
    chosen(torch.bfloat16, PACKED)
    assert tried[1].pitches == (256, 256)  # k is a view of q's heads there


class Registry:
    """torch.nn.attention's choice of a flash attention, with a third one that is wrong or right."""

    def __init__(self) -> None:
        self.active: str | None = None

    def activate_flash_attention_impl(self, name: str) -> None:
        self.active = name

    def current_flash_attention_impl(self) -> str | None:
        return self.active

    def restore_flash_attention_impl(self) -> None:
        self.active = None


@pytest.mark.parametrize("right", [True, False])
def test_flash_attention_3_is_activated_for_its_trial_and_withdrawn_if_it_fails(
    right: bool, emulated: Emulation, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = Registry()
    for name in ("activate", "current", "restore"):
        function = f"{name}_flash_attention_impl"
        monkeypatch.setattr(
            torch.nn.attention, function, getattr(registry, function), raising=False
        )
    hopper._activate_fa3.cache_clear()
    emulated.leak = not right
    assert (trial("flash3", kind()) == "ok") is right
    assert registry.active == ("FA3" if right else None)
    hopper._activate_fa3.cache_clear()


def test_hoppers_back_ends_are_for_hopper_with_what_they_need(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    q = torch.empty(sum(PACKED), 4, 64, dtype=torch.bfloat16)
    settings = AttentionSettings(plan_of(PACKED), None, 1.0)
    assert not BACKENDS["flash3"].suits(q, q, settings)
    assert not BACKENDS["cudnn_varlen"].suits(q, q, settings)
    monkeypatch.setattr(hopper, "_on_hopper", lambda q: True)
    assert not BACKENDS["flash3"].suits(q, q, settings)  # its package is not installed
    assert BACKENDS["cudnn_varlen"].suits(q, q, settings)
    monkeypatch.setattr(hopper, "_fa3_installed", lambda: True)
    assert BACKENDS["flash3"].suits(q, q, settings)
    windowed = AttentionSettings(plan_of(PACKED), 17, 1.0)
    assert BACKENDS["flash3"].suits(q, q, windowed)
    assert not BACKENDS["cudnn_varlen"].suits(q, q, windowed)
    frugal = AttentionSettings(dataclasses.replace(plan_of(PACKED), frugal=True), None, 1.0)
    assert not BACKENDS["cudnn_varlen"].suits(q, q, frugal)


@pytest.mark.parametrize("name", ["flash", "efficient"])
def test_a_trial_rejects_a_window_off_by_one(name: str, emulated: Emulation) -> None:
    emulated.skew = 1
    assert "wrong by" in trial(name, kind(windowed=True))


@pytest.mark.parametrize(
    ("name", "open_"), [("flash", False), ("flash", True), ("efficient", True), ("cudnn", False)]
)
def test_a_trial_rejects_documents_that_see_each_other(
    name: str, open_: bool, emulated: Emulation
) -> None:
    emulated.leak = True
    assert "wrong by" in trial(name, kind(open_=open_))


@pytest.mark.parametrize("name", ["flash", "efficient", "cudnn"])
def test_a_trial_reports_a_function_that_does_not_run_here(name: str) -> None:
    trial.cache_clear()
    assert "NotImplementedError" in trial(name, kind())
    trial.cache_clear()


def test_out_of_memory_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise torch.OutOfMemoryError("no room")

    backend = BACKENDS["flash"]
    monkeypatch.setitem(
        BACKENDS,
        "flash",
        backends.Backend("flash", full, full, backend.suits),  # type: ignore[arg-type]
    )
    with pytest.raises(torch.OutOfMemoryError):
        trial(name="flash", kind=kind(torch.float16))


def chosen(
    dtype: torch.dtype, lengths: tuple[int, ...], window: int | None = None, dim: int = 64
) -> str:
    q = torch.empty(sum(lengths), 4, dim, dtype=dtype)
    return select(q, q[:, :2], AttentionSettings(plan_of(lengths), window, dim**-0.5)).name


def answers(*working: str) -> Callable[[str, TrialKind], str]:
    return lambda name, kind: "ok" if name in working else "broken"


def test_the_fastest_back_end_that_suits_and_works_is_chosen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    half, whole = torch.float16, torch.float32
    monkeypatch.setattr(choice, "_torch_prefers_cudnn", lambda kind: True)
    monkeypatch.setattr(choice, "trial", answers("cudnn", "flash", "efficient"))
    assert chosen(half, WHOLE_BATCH) == "cudnn"
    assert chosen(half, WHOLE_BATCH, 40) == "flash"
    assert chosen(half, (100, 100)) == "flash"
    assert chosen(half, PACKED) == "flash"
    assert chosen(half, PACKED, dim=264) == "efficient"
    assert chosen(whole, WHOLE_BATCH) == "efficient"
    assert chosen(torch.float64, WHOLE_BATCH) == "documents"
    monkeypatch.setattr(choice, "_torch_prefers_cudnn", lambda kind: False)
    assert chosen(half, WHOLE_BATCH) == "flash"
    monkeypatch.setattr(choice, "trial", answers("efficient"))
    assert chosen(half, PACKED) == "efficient"
    monkeypatch.setattr(choice, "trial", answers())
    assert chosen(half, PACKED) == "documents"


def test_the_environment_chooses_on_purpose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENGINE_ATTENTION", "efficient")
    assert chosen(torch.float16, PACKED) == "efficient"
    monkeypatch.setenv("ENGINE_ATTENTION", "fast")
    with pytest.raises(ValueError, match="ENGINE_ATTENTION is 'fast'"):
        chosen(torch.float16, PACKED)


def test_every_answer_can_be_explained(emulated: Emulation) -> None:
    q = torch.empty(4, 2, 32)
    answer = explain(q, q)
    assert answer.keys() == BACKENDS.keys()
    assert answer["efficient"] == answer["documents"] == "ok"


def test_flash_takes_fewer_heads_at_a_time_before_32_bits_run_out(emulated: Emulation) -> None:
    plan = plan_of((300_000, 300_000))
    q, k = (torch.empty(600_000, h, 128, device="meta") for h in (32, 8))
    slices = backends._head_slices(q, k, plan)
    assert [s[1] for s in slices] == [slice(0, 6), slice(6, 12)]
    for heads, kv in slices:
        taken = q[:, heads].shape[1]
        assert taken == 4 * k[:, kv].shape[1]
        assert (600_000 + 256) * taken * 128 < 2**31
    assert sum(q[:, heads].shape[1] for heads, _ in slices) == 32
    many = torch.empty(5_000_000, 8, 128, device="meta")
    with pytest.raises(ValueError, match="split the batch"):
        backends._head_slices(many, k[:, :1], plan)


def test_heads_in_several_calls_give_what_one_call_gives(
    emulated: Emulation, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(PACKED)
    values = [torch.randn(196, h, 32) for h in (6, 3, 3)]
    results = []
    for limit in (2**31, 600 * 2 * 2 * 32):
        monkeypatch.setattr(backends, "_INT32_ELEMENTS", limit)
        q, k, v = (x.clone().requires_grad_(True) for x in values)
        out = attention(q, k, v, plan, backend="flash")
        grads = torch.autograd.grad(out.square().sum(), (q, k, v))
        results.append([out.detach(), *grads])
    assert emulated.calls.count("flash_forward") == 1 + 2
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tokens", [64, 4096, 500_000])
def test_a_frugal_batch_takes_a_group_of_heads_at_a_time(tokens: int) -> None:
    plan = dataclasses.replace(plan_of((tokens,)), frugal=True)
    q, k = (torch.empty(tokens, h, 128, device="meta") for h in (32, 8))
    slices = backends._head_slices(q, k, plan)
    assert [s[1] for s in slices] == [slice(i, i + 1) for i in range(8)]
    assert sum(q[:, heads].shape[1] for heads, _ in slices) == 32
    assert len(backends._head_slices(q, k, plan_of((min(tokens, 4096),)))) == 1


def test_a_frugal_batch_gives_what_any_other_gives(emulated: Emulation) -> None:
    values = [torch.randn(196, h, 32) for h in (6, 3, 3, 6)]
    results = []
    for frugal in (False, True):
        plan = dataclasses.replace(plan_of(PACKED), frugal=frugal)
        q, k, v, do = (x.clone() for x in values)
        settings = AttentionSettings(plan, None, 32**-0.5, "flash")
        out, saved = attention_forward(q, k, v, settings)
        wide = torch.full((196, 12, 32), float("nan"))
        into = (wide[:, :6], wide[:, 6:9], wide[:, 9:])
        grads = attention_backward(do, q, k, v, out, saved, settings, into)
        assert all(mine is given for mine, given in zip(grads, into, strict=True))
        results.append([out, *into])
    assert emulated.calls.count("flash_forward") == 1 + 3
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)


def test_torchs_own_shape_functions_accept_the_flash_calls() -> None:
    """torch knows the shapes of its CUDA functions without a GPU, for the schema installed here."""
    plan = plan_of(PACKED)
    with FakeTensorMode():
        q, k = (torch.empty(196, h, 64, dtype=torch.bfloat16, device="cuda") for h in (4, 2))
        boundaries = torch.empty(4, dtype=torch.int32, device="cuda")
        plan = AttentionPlan(boundaries, plan.bounds)
        flash, settings = BACKENDS["flash"], AttentionSettings(plan, 20, 0.1)
        out, saved = flash.forward(q, k, k, settings)
        assert out.shape == q.shape
        assert saved[0].shape == (4, 196)
        grads = flash.backward(out, q, k, k, out, saved, settings)
        assert [g.shape for g in grads] == [q.shape, k.shape, k.shape]
