"""Host memory for a GPU: exact pages that are pinned once and freed, or cached powers of two."""

import gc
import mmap

import pytest
import torch

from kernels.runtime import host_memory
from kernels.runtime.host_memory import cached_bytes, paged_bytes, registered


class Runtime:
    """CUDA's runtime library, as far as it is asked for here."""

    def __init__(self, status: int = 0) -> None:
        self.status, self.pinned, self.calls = status, dict[int, int](), list[str]()

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        self.calls.append("register")
        if self.status == 0:
            self.pinned[address] = nbytes
        return self.status

    def cudaHostUnregister(self, address: int) -> int:
        self.calls.append("unregister")
        del self.pinned[address]
        return 0


@pytest.mark.parametrize("shape", [(1,), (3, 1000), (151_936, 64)])
def test_pinned_memory_takes_its_bytes_to_a_page(shape: tuple[int, ...]) -> None:
    runtime = Runtime()
    tensor = registered(shape, torch.bfloat16, runtime)
    ((address, nbytes),) = runtime.pinned.items()
    assert address == tensor.data_ptr()
    assert address % mmap.PAGESIZE == 0
    assert nbytes == paged_bytes(tensor.nbytes) < tensor.nbytes + mmap.PAGESIZE
    assert (tensor.shape, tensor.dtype) == (shape, torch.bfloat16)
    tensor.fill_(2.0)
    assert float(tensor.flatten()[-1]) == 2.0


def test_memory_is_unpinned_when_the_last_view_of_it_is_freed() -> None:
    runtime = Runtime()
    tensor = registered((8, 1024), torch.float32, runtime)
    view = tensor[1:3]
    del tensor
    gc.collect()
    assert len(runtime.pinned) == 1
    assert view.shape == (2, 1024)
    del view
    gc.collect()
    assert runtime.pinned == {}
    assert runtime.calls == ["register", "unregister"]


def test_what_cannot_be_pinned_is_said_and_never_unpinned(
    caplog: pytest.LogCaptureFixture,
) -> None:
    runtime = Runtime(status=2)
    tensor = registered((5,), torch.float32, runtime)
    assert "could not pin 20 bytes" in caplog.text
    del tensor
    gc.collect()
    assert runtime.calls == ["register"]


def test_nothing_is_pinned_for_no_elements() -> None:
    runtime = Runtime()
    assert registered((0, 4), torch.float32, runtime).shape == (0, 4)
    assert runtime.calls == []


def test_a_gpu_s_long_lived_host_memory_is_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = Runtime()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    x = torch.randn(33, 65)
    copy = host_memory.host_copy(x, torch.float64)
    assert torch.equal(copy, x.double())
    assert list(runtime.pinned.values()) == [paged_bytes(copy.nbytes)]


def test_sizes_are_those_of_pages_and_of_powers_of_two() -> None:
    assert [paged_bytes(n) for n in (0, 1, 4096, 4097)] == [0, 4096, 4096, 8192]
    assert [cached_bytes(n) for n in (0, 1, 3, 4096, 4097)] == [0, 1, 4, 4096, 8192]
