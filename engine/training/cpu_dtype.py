"""Try and choose the compute type of a run on a CPU.

Processors with instructions for bf16 products (AMX, AVX-512 BF16) multiply several times faster in
bf16; others emulate it and are several times slower. What is chosen stands in the run's settings
from then on, so that a resumed run computes as it began, on any machine.
"""

from __future__ import annotations

import functools
import logging
import time

import torch

from engine.config.train_config import TrainConfig
from engine.device import resolve_device
from engine.errors import EngineError
from engine.model_sources.scratch.open_base import describe_base
from engine.runs.stored import CONFIG, read_settings
from models.config.model_config import ModelConfig

log = logging.getLogger(__name__)

NARROWEST = 256
"""Models whose hidden size is less stay in fp32: their time does not go into products."""

_FASTER = 1.5
_SECONDS = 0.1
_SHAPE = (256, 1024, 1024)


def with_cpu_dtype(
    config: TrainConfig, gpu: bool | None = None, model: ModelConfig | None = None
) -> TrainConfig:
    """`config` with the compute type of `--dtype auto` chosen, where the run is on a CPU.

    A run that goes on has the type that its settings name. Weights that are trained themselves stay
    in fp32, which small updates need. `gpu` and `model` are looked up where they are not given; a
    model that cannot be read leaves the choice open: the checks of the run say why.
    """
    if config.dtype != "auto":
        return config
    try:
        if resolve_device(config.device).type != "cpu" if gpu is None else gpu:
            return config
        earlier = _of_the_run(config)
        if earlier is None:
            model = model or describe_base(config).config
    except EngineError:
        return config
    if earlier is None:
        assert model is not None
        narrow = bool(config.every_weight or config.saved_modules) or model.hidden_size < NARROWEST
        earlier = "float32" if narrow else faster_type()[0]
    return config.model_copy(update={"dtype": earlier})


def _of_the_run(config: TrainConfig) -> str | None:
    """The type of the run that `config` goes on with; before types were stored it was fp32."""
    if config.resume is None or config.output_dir is None:
        return None
    if not (config.output_dir / CONFIG).is_file():
        return None
    stored = read_settings(config.output_dir).get("dtype")
    return "float32" if stored is None or stored.value == "auto" else str(stored.value)


def has_bfloat16_products() -> bool:
    """Whether this processor has instructions for products of bf16 matrices."""
    asked = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(bool(getattr(torch.cpu, name, lambda: False)()) for name in asked)


@functools.cache
def faster_type() -> tuple[str, str]:
    """The type in which this processor multiplies faster, tried for a tenth of a second, and why.

    It is tried once in a process.
    """
    if not has_bfloat16_products():
        return "float32", "this processor has no bfloat16 products"
    rates = product_rates()
    chosen = "bfloat16" if rates["bfloat16"] > _FASTER * rates["float32"] else "float32"
    wide, narrow = (rates[name] / 1e9 for name in ("float32", "bfloat16"))
    return chosen, f"products run at {narrow:.0f} GFLOP/s in bfloat16 and {wide:.0f} in float32"


def log_choice(dtype: str) -> None:
    """Log the type that a run on a CPU computes in, and why where it was tried."""
    why = f": {faster_type()[1]}" if faster_type.cache_info().currsize else ""
    log.info("computing in %s%s", dtype, why)


def product_rates(seconds: float = _SECONDS) -> dict[str, float]:
    """Operations per second of a product in each type, the best of those that fit `seconds`.

    The types take turns, so that other programs on the machine slow both.
    """
    rows, inner, columns = _SHAPE
    operands = {
        name: (torch.ones(rows, inner, dtype=dtype), torch.ones(columns, inner, dtype=dtype))
        for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16))
    }
    best = dict.fromkeys(operands, float("inf"))
    end = time.perf_counter() + seconds
    turns = 0
    while turns < 2 or time.perf_counter() < end:
        for name, (left, right) in operands.items():
            began = time.perf_counter()
            left @ right.T
            if turns:  # the first one sets up
                best[name] = min(best[name], time.perf_counter() - began)
        turns += 1
    return {name: 2.0 * rows * inner * columns / took for name, took in best.items()}
