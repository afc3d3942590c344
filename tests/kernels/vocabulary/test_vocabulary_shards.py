"""Lookups and the loss over a divided vocabulary, against whole matrices."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from kernels.linear.int8 import Int8Weight, quantize_int8, rows_int8
from kernels.loss.cross_entropy import PLAIN, LossTerms
from kernels.loss.linear_cross_entropy import Head, head_logits, linear_cross_entropy
from kernels.runtime.ranks import ONE_RANK
from kernels.vocabulary.lookup import lookup
from kernels.vocabulary.shard import BLOCK, VocabularyShard, own_rows, rows_per_rank
from kernels.vocabulary.sharded_cross_entropy import sharded_cross_entropy, sharded_logits
from kernels.vocabulary.traffic import lookup_bytes, loss_bytes
from tests.support.processes.rank_threads import ThreadRanks, run_ranks

VOCABULARY, WIDTH, ITEMS = 150, 32, 11.0
COUNTS = (7, 0, 23, 3)
TERMS = [PLAIN, LossTerms(0.1, 0.0), LossTerms(0.2, 1e-2)]


def matrix(dtype: torch.dtype = torch.float64) -> Tensor:
    draw = torch.Generator().manual_seed(1)
    return torch.randn(VOCABULARY, WIDTH, generator=draw, dtype=torch.float64).to(dtype)


def tokens(rank: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, targets and weights of a rank."""
    draw = torch.Generator().manual_seed(10 + rank)
    count = COUNTS[rank]
    hidden = torch.randn(count, WIDTH, generator=draw, dtype=torch.float64).to(dtype)
    targets = torch.randint(0, VOCABULARY, (count,), generator=draw)
    return hidden, targets, torch.rand(count, generator=draw)


def part_of(weight: Head, ranks: ThreadRanks) -> VocabularyShard:
    rows = own_rows(weight.shape[0], weight.shape[1], ranks)
    if isinstance(weight, Int8Weight):
        own: Head = Int8Weight(weight.codes[rows], weight.absmax[rows], weight.dtype)
    else:
        own = weight.detach()[rows].clone().requires_grad_(weight.requires_grad)
    return VocabularyShard(own, weight.shape[0], ranks)


Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def value_and_gradient(
    hidden: Tensor, targets: Tensor, weights: Tensor, loss: Loss
) -> tuple[Tensor, ...]:
    hidden = hidden.clone().requires_grad_()
    value = loss(hidden, targets, weights)
    (value * 3.0).backward()
    assert hidden.grad is not None
    return value.detach(), hidden.grad


def close(mine: Tensor, other: Tensor, bound: float) -> None:
    assert mine.shape == other.shape
    if other.numel():
        assert float((mine - other).abs().max()) <= bound * max(1.0, float(other.abs().max()))


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("chunk", [None, 5])
def test_loss_and_gradients_are_those_of_the_whole_head(
    terms: LossTerms, weighted: bool, ranks: int, chunk: int | None
) -> None:
    whole = matrix().requires_grad_()

    def plain(hidden: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        given = weights if weighted else None
        return linear_cross_entropy(hidden, whole, targets, ITEMS, None, given, terms)

    expected = [value_and_gradient(*tokens(rank), plain) for rank in range(ranks)]
    assert whole.grad is not None

    def work(own: ThreadRanks) -> Tensor:
        shard = part_of(whole, own)

        def divided(hidden: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
            given = weights if weighted else None
            return sharded_cross_entropy(hidden, shard, targets, ITEMS, chunk, given, terms)

        for mine, other in zip(
            value_and_gradient(*tokens(own.rank), divided), expected[own.rank], strict=True
        ):
            close(mine, other, 1e-12)
        assert isinstance(shard.weight, Tensor) and shard.weight.grad is not None
        return shard.weight.grad

    close(torch.cat(run_ranks(ranks, work)), whole.grad, 1e-12)


@pytest.mark.parametrize("kind", ["fp32", "int8"])
def test_single_precision_and_8_bit_heads(kind: str) -> None:
    dense = matrix(torch.float32)
    whole: Head = quantize_int8(dense) if kind == "int8" else dense

    def plain(hidden: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, whole, targets, ITEMS)

    expected = [value_and_gradient(*tokens(rank, torch.float32), plain) for rank in range(4)]
    errors = [[0.0, 0.0] for _ in range(4)]
    if kind != "int8":
        # On some processors sums in fp32 are 1e-6 from those of fp64: ours may be twice as far.

        def exact(hidden: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
            return linear_cross_entropy(hidden.double(), dense.double(), targets, ITEMS)

        true = [value_and_gradient(*tokens(rank, torch.float32), exact) for rank in range(4)]
        errors = [
            [
                float((a - b).abs().max()) if a.numel() else 0.0
                for a, b in zip(one, two, strict=True)
            ]
            for one, two in zip(expected, true, strict=True)
        ]

    def work(own: ThreadRanks) -> None:
        shard = part_of(whole, own)

        def divided(hidden: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
            return sharded_cross_entropy(hidden, shard, targets, ITEMS, 6)

        given = tokens(own.rank, torch.float32)
        for mine, other, error in zip(
            value_and_gradient(*given, divided), expected[own.rank], errors[own.rank], strict=True
        ):
            close(mine, other, max(1e-6, 2 * error))

    run_ranks(4, work)


def test_16_bit_hidden_states_lose_no_more_than_with_a_whole_head() -> None:
    head = matrix(torch.bfloat16)
    hidden, targets, weights = tokens(2, torch.bfloat16)
    exact = value_and_gradient(
        hidden.double(),
        targets,
        weights,
        lambda h, t, _: linear_cross_entropy(h, head.double(), t, ITEMS),
    )
    plain = value_and_gradient(
        hidden, targets, weights, lambda h, t, _: linear_cross_entropy(h, head, t, ITEMS)
    )

    def work(own: ThreadRanks) -> tuple[Tensor, ...]:
        shard = part_of(head, own)
        count = len(targets) if own.rank == 1 else 0
        return value_and_gradient(
            hidden[:count],
            targets[:count],
            weights[:count],
            lambda h, t, _: sharded_cross_entropy(h, shard, t, ITEMS),
        )

    mine = run_ranks(2, work)[1]
    for ours, theirs, truth in zip(mine, plain, exact, strict=True):
        ulp = torch.finfo(ours.dtype).eps * float(truth.abs().max())
        allowed = 2 * float((theirs.double() - truth).abs().max()) + ulp
        assert float((ours.double() - truth).abs().max()) <= allowed


def test_no_rank_has_a_token() -> None:
    def work(own: ThreadRanks) -> None:
        shard = part_of(matrix().requires_grad_(), own)
        hidden = torch.empty(0, WIDTH, dtype=torch.float64, requires_grad=True)
        loss = sharded_cross_entropy(hidden, shard, torch.empty(0, dtype=torch.int64), 1.0)
        loss.backward()
        assert loss.item() == 0.0
        assert isinstance(shard.weight, Tensor) and shard.weight.grad is not None
        assert not shard.weight.grad.any()

    run_ranks(2, work)


def test_a_target_outside_the_vocabulary_makes_the_loss_no_number_on_its_rank() -> None:
    def work(own: ThreadRanks) -> float:
        hidden, targets, _ = tokens(0)
        if own.rank == 1:
            targets[2] = VOCABULARY
        return float(sharded_cross_entropy(hidden, part_of(matrix(), own), targets, 1.0))

    good, bad = run_ranks(2, work)
    assert good == good and bad != bad


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("kind", ["dense", "int8"])
def test_logits_are_those_of_the_whole_head(ranks: int, kind: str) -> None:
    whole: Head = quantize_int8(matrix()) if kind == "int8" else matrix()
    hidden, _, _ = tokens(2)
    expected = head_logits(hidden, whole)

    def work(own: ThreadRanks) -> None:
        close(sharded_logits(hidden, part_of(whole, own)), expected, 1e-12)

    run_ranks(ranks, work)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_looked_up_rows_are_the_bits_of_the_matrix_and_gradients_go_to_their_owners(
    ranks: int,
) -> None:
    whole = nn.Parameter(matrix())
    expected = []
    for rank in range(ranks):
        out = nn.functional.embedding(tokens(rank)[1], whole)
        (out * (rank + 1.0)).sum().backward()
        expected.append(out.detach())
    assert whole.grad is not None

    def work(own: ThreadRanks) -> Tensor:
        shard = part_of(whole, own)
        out = lookup(shard, tokens(own.rank)[1])
        assert torch.equal(out, expected[own.rank])
        (out * (own.rank + 1.0)).sum().backward()
        assert isinstance(shard.weight, Tensor) and shard.weight.grad is not None
        return shard.weight.grad

    close(torch.cat(run_ranks(ranks, work)), whole.grad, 1e-12)


def test_looked_up_8_bit_rows_are_the_bits_of_the_matrix() -> None:
    whole = quantize_int8(matrix(torch.float32))

    def work(own: ThreadRanks) -> None:
        ids = tokens(own.rank)[1]
        assert torch.equal(lookup(part_of(whole, own), ids), rows_int8(whole, ids))

    run_ranks(2, work)


@pytest.mark.parametrize("size", [(150, 32), (151936, 4096), (7, 96), (3, 5)])
@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_rows_are_dealt_once_in_whole_blocks(size: tuple[int, int], ranks: int) -> None:
    vocabulary, width = size

    class Numbered:
        def __init__(self, rank: int) -> None:
            self.rank, self.size = rank, ranks

    parts = [own_rows(vocabulary, width, Numbered(rank)) for rank in range(ranks)]  # type: ignore[arg-type]
    assert [row for part in parts for row in range(part.start, part.stop)] == [*range(vocabulary)]
    assert all(part.start * width % BLOCK == 0 or part.start == vocabulary for part in parts)
    most = rows_per_rank(vocabulary, width, ranks)
    assert most * ranks < vocabulary + ranks * BLOCK


def test_a_process_alone_has_every_row() -> None:
    hidden, targets, _ = tokens(0)
    shard = VocabularyShard(matrix(), VOCABULARY, ONE_RANK)
    assert torch.equal(lookup(shard, targets), matrix()[targets])
    mine = sharded_cross_entropy(hidden, shard, targets, ITEMS)
    close(mine, linear_cross_entropy(hidden, matrix(), targets, ITEMS), 1e-12)
    with pytest.raises(ValueError, match="do not fit"):
        sharded_cross_entropy(hidden, shard, targets[:2], ITEMS)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("gradient", [True, False])
def test_bytes_given_follow_their_formulas(dtype: torch.dtype, gradient: bool) -> None:
    whole = matrix(dtype)

    def work(own: ThreadRanks) -> None:
        shard = part_of(whole, own)
        hidden, targets, _ = tokens(own.rank, dtype)
        own.sent.clear()
        lookup(shard, targets)
        rows = own_rows(VOCABULARY, WIDTH, own)
        every = torch.cat([tokens(rank)[1] for rank in range(4)])
        answered = int(((every >= rows.start) & (every < rows.stop)).sum())
        expected = lookup_bytes(len(targets), answered, WIDTH * dtype.itemsize, 4)
        assert own.sent.total() == expected
        own.sent.clear()
        sharded_cross_entropy(hidden.requires_grad_(gradient), shard, targets, ITEMS, 6)
        expected = loss_bytes(max(COUNTS), 6, WIDTH, dtype.itemsize, 4, gradient=gradient)
        assert own.sent.total() == expected

    run_ranks(4, work)
