"""Where a step's time goes: kernels, launches, waits of the host.

One warmed-up step under `torch.profiler`. Launches per layer are the difference between a model of
four layers and one of two, halved, so that embedding, head and optimiser do not count. Waits are
the warnings of CUDA's sync debug mode.
"""

from __future__ import annotations

import re
import time
import warnings
from functools import partial
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from bench.gpu.step import StepSpec, build, random_batch
from engine.benchmark.cases.shapes import configuration
from engine.benchmark.timing import clear, synchronize
from models.config.model_config import ModelConfig

KINDS = (
    ("NF4", r"nf4|dequantize"),
    ("attention", r"flash|fmha|attention|cudnn.*sdpa"),
    ("cross-entropy", r"cross_entropy"),
    ("optimiser", r"adamw|grad_norm|prepare_kernel|multi_tensor"),
    ("norms", r"rms_norm"),
    ("rotation", r"rope"),
    ("SwiGLU", r"swiglu|silu"),
    ("products", r"gemm|cutlass|nvjet|\bmm\b|addmm|matmul|cublas"),
    ("copies", r"memcpy|memset|copy|cat"),
)
_TOP = 25


def kind_of(name: str) -> str:
    """Which part of the step a kernel belongs to, by its name."""
    lowered = name.lower()
    return next((kind for kind, pattern in KINDS if re.search(pattern, lowered)), "other")


def profile_step(
    spec: StepSpec, device: torch.device, dtype: torch.dtype, *, small: bool = False
) -> dict[str, Any]:
    """Device time by kind and by kernel, launches, and the share of the step the device worked."""
    config = configuration(spec.model, small)
    events, wall = _events(config, spec, device, dtype)
    total = sum(seconds for _, seconds in events.values())
    kinds: dict[str, float] = {}
    for name, (_, seconds) in events.items():
        kinds[kind_of(name)] = kinds.get(kind_of(name), 0.0) + seconds
    ordered = sorted(events.items(), key=lambda entry: -entry[1][1])
    fewer, more = (
        sum(count for count, _ in _events(config.with_layers(n), spec, device, dtype)[0].values())
        for n in (2, 4)
    )
    return {
        "spec": str(spec),
        "device_seconds": total,
        "profiled_wall_seconds": wall,
        "launches": sum(count for count, _ in events.values()),
        "launches_per_layer": (more - fewer) / 2,
        "kinds": dict(sorted(kinds.items(), key=lambda entry: -entry[1])),
        "top": [
            {"kernel": name[:120], "count": count, "seconds": seconds}
            for name, (count, seconds) in ordered[:_TOP]
        ],
    }


def _events(
    config: ModelConfig, spec: StepSpec, device: torch.device, dtype: torch.dtype
) -> tuple[dict[str, tuple[int, float]], float]:
    """Kernel (on a CPU, operator) -> calls and seconds of one step; and the step's seconds."""
    clear(device)
    step, batch = build(config, spec, device, dtype), random_batch(config, spec, device)
    for number in range(2):
        step([batch], number)
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    synchronize(device)
    with profile(activities=activities) as record:
        started = time.perf_counter()
        step([batch], 2)
        synchronize(device)
        wall = time.perf_counter() - started
    by_kernel: dict[str, tuple[int, float]] = {}
    for event in record.key_averages():
        if cuda and not str(event.device_type).endswith("CUDA"):
            continue
        spent = event.self_device_time_total if cuda else event.self_cpu_time_total
        by_kernel[event.key] = (int(event.count), float(spent) / 1e6)
    return by_kernel, wall


def host_waits(
    spec: StepSpec, device: torch.device, dtype: torch.dtype, *, small: bool = False
) -> dict[str, Any]:
    """How often the host waited for the device in one step of two layers, and of four."""
    config = configuration(spec.model, small)
    counts = {}
    for layers in (2, 4):
        step = build(config.with_layers(layers), spec, device, dtype)
        batch = random_batch(config, spec, device)
        for number in range(2):
            step([batch], number)
        counts[layers] = _count_waits(partial(step, [batch], 2))
    return {"spec": str(spec), "two_layers": counts[2], "four_layers": counts[4]}


def _count_waits(call: Any) -> int | None:
    if not torch.cuda.is_available():
        return None
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(entry.message).lower() for entry in caught)
