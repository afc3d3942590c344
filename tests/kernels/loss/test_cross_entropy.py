"""The loss and gradient of a chunk of logits against float64 truth."""

from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.loss import cross_entropy

Accurate = Callable[[Tensor, Tensor, Tensor], None]
Mutant = Callable[[ModuleType, str, str], ModuleType]
SCALE = 0.25


def plain(
    logits: Tensor,
    targets: Tensor,
    dtype: torch.dtype,
    weights: Tensor | None = None,
    terms: cross_entropy.LossTerms = cross_entropy.PLAIN,
) -> tuple[Tensor, Tensor]:
    """Losses and SCALE times the gradient by torch's own functions in `dtype`."""
    z = logits.to(dtype).detach().requires_grad_(True)
    losses = F.cross_entropy(z, targets, reduction="none", label_smoothing=terms.label_smoothing)
    if terms.z_loss:
        losses = losses + terms.z_loss * z.logsumexp(1).square()
    if weights is not None:
        losses = losses * weights.to(dtype)
    (grad,) = torch.autograd.grad(losses.sum() * SCALE, z)
    return losses.detach(), grad


def check(
    module: ModuleType,
    accurate: Accurate,
    shape: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
    terms: cross_entropy.LossTerms = cross_entropy.PLAIN,
    weighted: bool = False,
) -> None:
    rows, vocabulary = shape
    joined = (torch.randn(rows, vocabulary + 5, device=device) * 4).to(dtype)
    logits, rest = joined[:, :vocabulary], joined[:, vocabulary:].clone()
    targets = torch.randint(0, vocabulary, (rows,), device=device)
    targets[-1] = vocabulary - 1
    weights = torch.rand(rows, device=device) * 3 if weighted else None
    other = plain(logits, targets, dtype, weights, terms)
    truth = plain(logits, targets, torch.float64, weights, terms)
    options = {} if not (terms or weighted) else {"weights": weights, "terms": terms}
    losses = module.cross_entropy_(logits, targets, SCALE, **options)
    assert losses.dtype == torch.float32
    accurate(losses, other[0], truth[0])
    accurate(logits, other[1], truth[1])
    assert torch.equal(joined[:, vocabulary:], rest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (63, 63), (17, 257), (5, 2000), (2, 4096), (2, 9001)])
def test_losses_and_gradients_are_accurate(
    shape: tuple[int, int],
    dtype: torch.dtype,
    way: str,
    device: torch.device,
    accurate: Accurate,
) -> None:
    check(cross_entropy, accurate, shape, dtype, device)


SMOOTHED = cross_entropy.LossTerms(0.1, 0.0)
WITH_Z = cross_entropy.LossTerms(0.0, 1e-2)
BOTH = cross_entropy.LossTerms(0.2, 1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("shape", "terms", "weighted"),
    [
        ((1, 7), SMOOTHED, False),
        ((63, 257), SMOOTHED, False),
        ((5, 2000), WITH_Z, True),
        ((3, 9001), BOTH, True),
        ((17, 63), cross_entropy.PLAIN, True),
    ],
)
def test_smoothing_z_loss_and_weights_are_accurate(
    shape: tuple[int, int],
    terms: cross_entropy.LossTerms,
    weighted: bool,
    dtype: torch.dtype,
    way: str,
    device: torch.device,
    accurate: Accurate,
) -> None:
    check(cross_entropy, accurate, shape, dtype, device, terms, weighted)


def test_terms_out_of_range_are_refused() -> None:
    for wrong in ((1.0, 0.0), (-0.1, 0.0), (0.0, -1e-4)):
        with pytest.raises(ValueError, match="label_smoothing must lie"):
            cross_entropy.LossTerms(*wrong)
    logits, targets = torch.randn(3, 10), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match="weights for"):
        cross_entropy.cross_entropy_(logits, targets, weights=torch.ones(2))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("summed += ", "summed = "),
        ("factor *= 1.0 + 2.0 * z_loss * level", "factor *= 1.0 + z_loss * level"),
        ("floor = scale * smoothing", "floor = scale * scale"),
        ("scale *= 1.0 - smoothing", "scale *= 1.0"),
        ("        scale *= weight", "        scale *= 1.0"),
        ("loss *= weight", "loss *= 1.0"),
        ("loss += tl.where", "loss -= tl.where"),
    ],
)
def test_a_planted_fault_in_a_term_breaks_the_rule(
    old: str, new: str, triton_on: None, device: torch.device, accurate: Accurate, mutant: Mutant
) -> None:
    broken = mutant(cross_entropy, old, new)
    with pytest.raises(AssertionError):
        check(broken, accurate, (3, 9001), torch.float32, device, BOTH, weighted=True)


def test_the_largest_vocabulary_is_accurate(
    triton_on: None, device: torch.device, accurate: Accurate
) -> None:
    check(cross_entropy, accurate, (1, 262144), torch.float32, device)


def test_losses_alone_are_those_with_the_gradient(way: str, device: torch.device) -> None:
    logits = torch.randn(20, 300, device=device)
    targets = torch.randint(0, 300, (20,), device=device)
    alone = cross_entropy.cross_entropy_(logits.clone(), targets, gradient=False)
    assert torch.equal(alone, cross_entropy.cross_entropy_(logits, targets))


def test_extreme_logits_stay_finite(way: str, device: torch.device) -> None:
    logits = torch.full((3, 5000), -1e4, device=device)
    logits[0, 4999] = 1e4
    logits[1, :4500] = float("-inf")
    logits[2, 0] = 3e38
    targets = torch.tensor([4999, 4600, 0], device=device)
    truth = F.cross_entropy(logits.double(), targets, reduction="none").float()
    losses = cross_entropy.cross_entropy_(logits, targets)
    torch.testing.assert_close(losses, truth, rtol=1e-6, atol=1e-6)
    assert torch.isfinite(logits).all()
    torch.testing.assert_close(logits.sum(1), torch.zeros(3, device=device), atol=1e-5, rtol=0)


def test_a_target_outside_the_vocabulary_gives_nan(triton_on: None, device: torch.device) -> None:
    logits = torch.randn(3, 100, device=device)
    targets = torch.tensor([100, -100, 7], device=device)
    losses = cross_entropy.cross_entropy_(logits, targets)
    assert torch.isnan(losses).tolist() == [True, True, False]


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        cross_entropy.cross_entropy_(torch.randn(3, 10), torch.zeros(4, dtype=torch.int64))


def test_rows_beyond_two_to_the_31_are_reached(triton_on: None, device: torch.device) -> None:
    stride = 2**30 + 8
    # numpy's memory is not touched until it is written, so these 4 GiB cost three pages.
    memory = torch.from_numpy(np.empty(2 * stride + 64, dtype=np.float16)).to(device)
    logits = memory.as_strided((3, 64), (stride, 1))
    logits.copy_(torch.randn(3, 64))
    near, targets = logits.clone(), torch.tensor([0, 63, 7], device=device)
    losses = cross_entropy.cross_entropy_(logits, targets)
    assert torch.equal(losses, cross_entropy.cross_entropy_(near, targets))
    assert torch.equal(logits, near)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("total * tl.exp(peak - base) + ", "total + "),
        ("        peak = top", "        peak = peak"),
        ("start + column == target, scale", "column == target, scale"),
        ("factor = scale / total", "factor = 1.0 / total"),
        ("* factor\n", "* scale\n"),
        ("(peak - picked)", "peak"),
        ("if GRADIENT:", "if not GRADIENT:"),
    ],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_planted_fault_breaks_the_rule(
    old: str, new: str, triton_on: None, device: torch.device, accurate: Accurate, mutant: Mutant
) -> None:
    broken = mutant(cross_entropy, old, new)
    with pytest.raises(AssertionError):
        check(broken, accurate, (3, 9001), torch.float32, device)
