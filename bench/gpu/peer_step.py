"""What steps through other libraries share: how they are timed and told.

A library gives a `Prepare`: a step of its own, on random weights. `measured_with` makes of it what
`bench.gpu.suite` calls, so that every side clears, warms up, clips and times alike.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from bench.gpu.step import StepSpec, model_flops, summary
from engine.benchmark.cases.shapes import configuration
from engine.benchmark.timing import clear, synchronize
from engine.provenance import installed
from models.config.model_config import ModelConfig

_WARMUP = 2


@dataclass(frozen=True)
class PeerStep:
    """A model in training mode, the loss of its batch, and the optimizer over what is trained."""

    model: nn.Module
    loss: Callable[[], Tensor]
    optimizer: torch.optim.Optimizer


Prepare = Callable[[StepSpec, ModelConfig, torch.device, torch.dtype], PeerStep]


class MeasureStep(Protocol):
    """The figures of `bench.gpu.step.measure_step` for another library, with its versions."""

    def __call__(
        self,
        spec: StepSpec,
        device: torch.device,
        dtype: torch.dtype,
        *,
        small: bool = False,
        steps: int = 3,
        peak_flops: float | None = None,
    ) -> dict[str, Any]: ...


def missing(packages: Sequence[str]) -> list[str]:
    """The packages that are not installed."""
    return [name for name in packages if find_spec(name) is None]


def measured_with(prepare: Prepare, packages: Sequence[str]) -> MeasureStep:
    """What measures the steps that `prepare` makes, with the versions of `packages`."""

    def measure_step(
        spec: StepSpec,
        device: torch.device,
        dtype: torch.dtype,
        *,
        small: bool = False,
        steps: int = 3,
        peak_flops: float | None = None,
    ) -> dict[str, Any]:
        clear(device)
        config = configuration(spec.model, small)
        seconds, losses = _timed(prepare(spec, config, device, dtype), steps)
        flops = model_flops(config, spec)
        return {
            **asdict(spec),
            **summary(seconds, spec.tokens, flops, peak_flops, device),
            "losses": losses,
            "versions": {name: installed(name) for name in packages},
        }

    return measure_step


def _timed(step: PeerStep, steps: int) -> tuple[list[float], list[float]]:
    """Seconds of whole steps, clipped to a norm of 1 as our own are, and all losses.

    The steps that warm up have a loss and no time.
    """
    trained = [parameter for parameter in step.model.parameters() if parameter.requires_grad]
    device = trained[0].device
    seconds, losses = [], []
    for number in range(_WARMUP + steps):
        if number == _WARMUP and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        synchronize(device)
        started = time.perf_counter()
        value = step.loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        step.optimizer.step()
        step.optimizer.zero_grad(set_to_none=True)
        losses.append(float(value.detach()))
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    return seconds[_WARMUP:], losses


def random_ids(config: ModelConfig, spec: StepSpec, device: torch.device) -> Tensor:
    """Random tokens (documents, length)."""
    return torch.randint(0, config.vocab_size, (spec.documents, spec.length), device=device)


def eight_bit_adamw(model: nn.Module) -> torch.optim.Optimizer:
    """bitsandbytes' AdamW8bit over what is trained."""
    import bitsandbytes

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(trained, lr=1e-4)
    return optimizer


def causal_loss(model: Any, ids: Tensor, dtype: torch.dtype) -> Callable[[], Tensor]:
    """The loss of transformers' model with every token trained, under autocast in 16 bits."""

    def loss() -> Tensor:
        half = dtype != torch.float32
        with torch.autocast(ids.device.type, dtype) if half else nullcontext():
            value: Tensor = model(input_ids=ids, labels=ids).loss
        return value

    return loss
