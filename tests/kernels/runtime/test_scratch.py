"""Working memory that is handed out again and again."""

from collections.abc import Iterator
from typing import Any
from weakref import ref

import pytest
import torch

from kernels.runtime.scratch import buffers, release, scratch

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    release()
    yield
    release()


def test_smaller_requests_share_the_memory_of_the_largest() -> None:
    large = scratch("one", (4, 6), torch.float32, CPU)
    small = scratch("one", (3, 5), torch.float32, CPU)
    assert small.shape == (3, 5)
    assert small.data_ptr() == large.data_ptr()
    other = scratch("other", (3, 5), torch.float32, CPU)
    assert other.data_ptr() != large.data_ptr()
    assert len(buffers()) == 2


def test_a_buffer_that_grows_is_never_there_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    scratch("one", (100,), torch.float32, CPU)
    (old,) = (ref(buffer) for buffer in buffers())
    plain, alive = torch.empty, []

    def watched(*size: Any, **options: Any) -> torch.Tensor:
        if size == (200,):
            alive.append(old() is not None)
        return plain(*size, **options)

    monkeypatch.setattr(torch, "empty", watched)
    assert scratch("one", (200,), torch.float32, CPU).shape == (200,)
    assert alive == [False]
