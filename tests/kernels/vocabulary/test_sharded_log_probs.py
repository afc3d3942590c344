"""Log-probabilities of sequences over a divided vocabulary, against the whole head."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.linear.int8 import quantize_int8
from kernels.loss.linear_cross_entropy import Head
from kernels.loss.linear_preference import sequence_log_probs
from kernels.runtime.ranks import ONE_RANK
from kernels.vocabulary.shard import VocabularyShard
from kernels.vocabulary.sharded_log_probs import sharded_log_probs
from kernels.vocabulary.traffic import log_prob_bytes
from models.layers.packed_batch import Sequences
from tests.kernels.vocabulary.test_vocabulary_shards import (
    COUNTS,
    VOCABULARY,
    WIDTH,
    close,
    matrix,
    part_of,
    tokens,
)
from tests.support.processes.rank_threads import ThreadRanks, run_ranks

LENGTHS = ((3, 4), (), (9, 0, 14), (3,))
"""Trained tokens of the sequences of every rank."""


def given(rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Sequences]:
    hidden, targets, _ = tokens(rank, dtype)
    assert sum(LENGTHS[rank]) == COUNTS[rank]
    lengths = LENGTHS[rank]
    return hidden, targets, Sequences.of(lengths, range(len(lengths)))


def values(
    rank: int, head: Head | VocabularyShard, dtype: torch.dtype, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """What a rank's sequences have, and its hidden states' gradient of a loss over them."""
    hidden, targets, where = given(rank, dtype)
    hidden.requires_grad_()
    if isinstance(head, VocabularyShard):
        sums = sharded_log_probs(hidden, head, targets, where.slots, where.shape, chunk)
    else:
        sums = sequence_log_probs(hidden, head, targets, where.slots, where.shape)
    # The gradient of a sequence follows from its value, as that of a preference does.
    (sums / 40.0).sigmoid().sum().backward()
    assert hidden.grad is not None
    return sums.detach(), hidden.grad


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("chunk", [None, 5])
@pytest.mark.parametrize("trained", [True, False])
def test_values_and_gradients_are_those_of_the_whole_head(
    ranks: int, chunk: int | None, trained: bool
) -> None:
    whole = matrix().requires_grad_(trained)
    expected = [values(rank, whole, torch.float64) for rank in range(ranks)]

    def work(own: ThreadRanks) -> Tensor | None:
        shard = part_of(whole, own)
        got = values(own.rank, shard, torch.float64, chunk)
        for mine, other in zip(got, expected[own.rank], strict=True):
            close(mine, other, 1e-12)
        assert isinstance(shard.weight, Tensor)
        return shard.weight.grad

    parts = run_ranks(ranks, work)
    if not trained:
        assert parts == [None] * ranks
        return
    assert whole.grad is not None
    close(torch.cat([part for part in parts if part is not None]), whole.grad, 1e-12)


@pytest.mark.parametrize("kind", ["fp32", "int8"])
def test_single_precision_and_8_bit_heads(kind: str) -> None:
    dense = matrix(torch.float32)
    whole: Head = quantize_int8(dense) if kind == "int8" else dense
    expected = [values(rank, whole, torch.float32) for rank in range(4)]

    def work(own: ThreadRanks) -> None:
        got = values(own.rank, part_of(whole, own), torch.float32, 6)
        for mine, other in zip(got, expected[own.rank], strict=True):
            close(mine, other, 1e-6)

    run_ranks(4, work)


def test_16_bit_hidden_states_lose_no_more_than_with_a_whole_head() -> None:
    head = matrix(torch.bfloat16)
    plain = values(2, head, torch.bfloat16)
    hidden, targets, where = given(2, torch.bfloat16)
    exact = hidden.double().requires_grad_()
    sums = sequence_log_probs(exact, head.double(), targets, where.slots, where.shape)
    (sums / 40.0).sigmoid().sum().backward()
    assert exact.grad is not None

    mine = run_ranks(4, lambda own: values(own.rank, part_of(head, own), torch.bfloat16))[2]
    for ours, theirs, truth in zip(mine, plain, (sums.detach(), exact.grad), strict=True):
        ulp = torch.finfo(ours.dtype).eps * float(truth.abs().max())
        allowed = 2 * float((theirs.double() - truth).abs().max()) + ulp
        assert float((ours.double() - truth).abs().max()) <= allowed


def test_a_target_outside_the_vocabulary_makes_its_sequence_no_number() -> None:
    def work(own: ThreadRanks) -> Tensor:
        hidden, targets, where = given(0, torch.float64)
        if own.rank == 1:
            targets[4] = VOCABULARY
        return sharded_log_probs(hidden, part_of(matrix(), own), targets, where.slots, where.shape)

    good, bad = run_ranks(2, work)
    assert good.isfinite().all() and bad.isfinite().tolist() == [True, False]


def test_a_process_alone_has_every_row() -> None:
    hidden, targets, where = given(0, torch.float64)
    shard = VocabularyShard(matrix(), VOCABULARY, ONE_RANK)
    mine = sharded_log_probs(hidden, shard, targets, where.slots, where.shape)
    close(mine, sequence_log_probs(hidden, matrix(), targets, where.slots, where.shape), 1e-12)
    with pytest.raises(ValueError, match="do not fit"):
        sharded_log_probs(hidden, shard, targets[:2], where.slots, where.shape)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_bytes_given_follow_their_formulas(dtype: torch.dtype) -> None:
    whole = matrix(dtype)

    def work(own: ThreadRanks) -> None:
        hidden, targets, where = given(own.rank, dtype)
        hidden.requires_grad_()
        own.sent.clear()
        shard = part_of(whole, own)
        sums = sharded_log_probs(hidden, shard, targets, where.slots, where.shape, 6)
        forward = own.sent.total()
        sums.sum().backward()
        expected = (
            log_prob_bytes(max(COUNTS), 6, WIDTH, dtype.itemsize, 4, gradient=gradient)
            for gradient in (False, True)
        )
        assert [forward, own.sent.total()] == list(expected)

    run_ranks(4, work)
