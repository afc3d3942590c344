"""A packed batch says which tokens are trained, and never crosses the end of a document."""

import pytest
import torch

from models.layers.packed_batch import PackedBatch

IDS = torch.arange(12).view(2, 6)


def test_the_next_token_of_the_same_document_is_the_target() -> None:
    labels = IDS.clone()
    labels[0, :3] = -100
    batch = PackedBatch.of(IDS, labels)
    assert batch.bounds == (0, 6, 12)
    assert batch.trained.tolist() == [2, 3, 4, 6, 7, 8, 9, 10]
    assert batch.targets.tolist() == [3, 4, 5, 7, 8, 9, 10, 11]
    assert (batch.tokens, batch.trained_tokens) == (12, 8)


def test_boundaries_divide_the_rows_anew() -> None:
    batch = PackedBatch.of(IDS, IDS, torch.tensor([0, 2, 12]))
    assert batch.bounds == (0, 2, 12)
    assert batch.trained.tolist() == [0, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    assert batch.cu_seqlens.dtype == torch.int32


def test_without_labels_nothing_is_trained() -> None:
    assert PackedBatch.of(IDS).trained_tokens == 0


@pytest.mark.parametrize("bounds", [[0, 5], [0, 7, 7, 12], [1, 12], [0, 13], [0]])
def test_boundaries_that_do_not_fit_are_refused(bounds: list[int]) -> None:
    with pytest.raises(ValueError, match="rise strictly from 0"):
        PackedBatch.of(IDS, IDS, torch.tensor(bounds))


def test_labels_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match="shape of input_ids"):
        PackedBatch.of(IDS, IDS[:, :5])


def test_a_batch_that_is_there_already_is_not_copied() -> None:
    batch = PackedBatch.of(IDS, IDS)
    moved = batch.to(torch.device("cpu"))
    pairs = zip(batch.tensors(), moved.tensors(), strict=True)
    assert all(one is other for one, other in pairs)
    assert moved.bounds is batch.bounds
