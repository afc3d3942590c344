"""Check a GPU's streams, pinned memory and allocator; measure its rates."""

from __future__ import annotations

import torch

from engine.benchmark.roofline import measure_roofline
from engine.selfcheck.options import CheckOptions, Finding, failed, passed
from kernels.runtime.host_memory import (
    SideCopies,
    SideUploads,
    host_buffer,
    host_copy,
    paged_bytes,
)
from models.layers.packed_batch import PackedBatch

_MIB = 2**20
_COPIES = 16


def check_side_copies(options: CheckOptions) -> Finding:
    """Copies to the host and back on a stream of their own, while memory is used again."""
    device, copies = options.device, SideCopies(options.device)
    truth = [torch.full((_MIB,), float(number)) for number in range(_COPIES)]
    hosts, events = [], []
    for number in range(_COPIES):
        x = torch.zeros(_MIB, device=device)
        x += number
        host = host_buffer(x)
        events.append(copies.start([(host, x)]))
        hosts.append(host)
        copies.wait(events[-1])
        del x
    back = [torch.empty(_MIB, device=device) for _ in hosts]
    for target, host in zip(back, hosts, strict=True):
        copies.wait(copies.start([(target, host)]))
    wrong = [n for n, x in enumerate(back) if not torch.equal(x.cpu(), truth[n])]
    if wrong:
        return failed(f"copies {wrong} of {_COPIES} came back changed")
    return passed(f"{_COPIES} buffers of 4 MiB to the host and back on a side stream")


def check_uploads(options: CheckOptions) -> Finding:
    """Batches that are sent while kernels run arrive whole, and their memory is not used too soon.

    What a queued kernel is to read is freed by the host, and the next batches are sent meanwhile.
    """
    device, uploads = options.device, SideUploads(options.device)
    side = 64 if options.small else 2048
    busy = torch.full((side, side), 1e-3, device=device)
    batches = [
        PackedBatch.of(torch.arange(4096) + number, torch.arange(4096) + number)
        for number in range(_COPIES)
    ]
    sums, ahead = list[torch.Tensor](), uploads.start(batches[0].joined())
    for number, batch in enumerate(batches):
        there = batch.divided(uploads.wait(*ahead))
        for _ in range(8):
            busy = busy @ busy
        if number + 1 < _COPIES:
            ahead = uploads.start(batches[number + 1].joined())
        sums.append(torch.stack([x.sum() for x in there.tensors()]))
        del there
    truth = [[int(x.sum()) for x in batch.tensors()] for batch in batches]
    wrong = [n for n, x in enumerate(sums) if x.tolist() != truth[n]]
    if wrong:
        return failed(f"batches {wrong} of {_COPIES} were read changed")
    return passed(f"{_COPIES} batches were sent while kernels ran")


def check_pinned(options: CheckOptions) -> Finding:
    """Pinned buffers are pinned, and take what was asked for, to a page."""
    x = torch.arange(3 * _MIB + 17, dtype=torch.float32, device=options.device)
    host = host_copy(x)
    if not torch.equal(host, x.cpu()):
        return failed("a pinned copy differs from its source")
    if options.device.type == "cuda" and not host.is_pinned():
        return failed("host memory for copies is not pinned: copies do not overlap with kernels")
    taken = host.untyped_storage().nbytes()
    if taken > paged_bytes(host.nbytes):
        return failed(f"{taken} bytes of pinned memory are taken for {host.nbytes}")
    return passed(f"{host.nbytes} bytes asked for, {paged_bytes(host.nbytes)} taken")


def check_allocator_limit(options: CheckOptions) -> Finding:
    """A limit raises an error that can be caught, and memory can be used after it."""
    device = options.device
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.empty_cache()
    limit = torch.cuda.memory_reserved(device) + 512 * _MIB
    torch.cuda.set_per_process_memory_fraction(limit / total, device)
    try:
        torch.empty(640 * _MIB, dtype=torch.uint8, device=device)
    except torch.OutOfMemoryError:
        half = torch.ones(128 * _MIB, dtype=torch.uint8, device=device)
        if int(half[-1]) != 1:
            return failed("memory that is within the limit cannot be used after an error")
        return passed("640 MiB were refused under a limit of 512 MiB, 128 MiB given after that")
    return failed("640 MiB were given under a limit of 512 MiB")


def measure_rates(options: CheckOptions) -> Finding:
    """Copy bandwidth and the rate of large matrix products, in this machine's own types."""
    roofline = measure_roofline(options.device, budget=0.1, small=options.small)
    rates = ", ".join(f"{name} {rate / 1e12:.3g}" for name, rate in roofline.flops.items())
    text = f"copy {roofline.bandwidth / 1e9:.4g} GB/s; products in TFLOP/s: {rates}"
    return passed(text, {"bandwidth": roofline.bandwidth, "flops": dict(roofline.flops)})
