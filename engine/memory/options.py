"""The ladder of settings that buy memory with time, the cheapest step first.

What a step costs is assumed, as a share of the step's time, from the ratio of what it moves or
decodes to what a layer computes (bytes over a GPU's bus and operations over its rate for a few
thousand tokens): it decides the order in which settings are tried and nothing else. None changes
which function is differentiated but the 8-bit head, which rounds the head once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engine.config.train_config import TrainConfig

NAMES = (
    "gradient_checkpointing",
    "batch_size",
    "accumulate",
    "optimizer_in_backward",
    "embedding_on",
    "offload",
    "mlp_tile_tokens",
    "loss_chunk_tokens",
    "head_precision",
    "low_memory_decode",
    "max_length",
)
"""The settings that a search may change, in the order in which they are shown."""

_WIDE_TILE, _NARROW_TILE, _FEW_ROWS = 2048, 512, 64


@dataclass(frozen=True)
class MemoryOption:
    """One step of the ladder: what it sets, and the share of a step's time that it costs."""

    setting: str
    value: object
    cost: float


def memory_options(config: TrainConfig, gpu: bool, tied: bool) -> list[MemoryOption]:
    """The memory options that this run can pull and has not pulled, the cheapest first.

    What lends memory to the host is for a GPU only, and a tied embedding stays with the head. The
    optimizer steps in backward only where that learns the same: see `steps_in_backward`.
    """
    frozen = config.method != "full"
    tile, rows = config.mlp_tile_tokens, config.loss_chunk_tokens
    streams = config.method == "qlora" and not config.use_dora
    choices = (
        (gpu and frozen and not tied, MemoryOption("embedding_on", "host", 0.001)),
        (steps_in_backward(config), MemoryOption("optimizer_in_backward", True, 0.005)),
        (gpu, MemoryOption("offload", "checkpoints", 0.01)),
        (tile is None or tile > _WIDE_TILE, MemoryOption("mlp_tile_tokens", _WIDE_TILE, 0.01)),
        (rows > _FEW_ROWS, MemoryOption("loss_chunk_tokens", _FEW_ROWS, 0.02)),
        (frozen, MemoryOption("head_precision", "8bit", 0.02)),
        (tile is None or tile > _NARROW_TILE, MemoryOption("mlp_tile_tokens", _NARROW_TILE, 0.03)),
        (True, MemoryOption("low_memory_decode", True, 0.15)),
        (gpu and streams, MemoryOption("offload", "weights", 0.5)),
    )
    return [option for possible, option in choices if possible and not _pulled(config, option)]


def _pulled(config: TrainConfig, option: MemoryOption) -> bool:
    present = getattr(config, option.setting)
    return option.value in present if option.setting == "offload" else bool(present == option.value)


def steps_in_backward(config: TrainConfig) -> bool:
    """Whether the optimizer of these settings may step in backward and learn the same."""
    alone = config.max_grad_norm == 0 and config.accumulate == 1
    return config.method == "full" and alone and config.dtype != "float16"


def pull(config: TrainConfig, options: Sequence[MemoryOption]) -> TrainConfig:
    """The settings with these memory options pulled; of two for one setting the later stands.

    Where the settings accumulate, the optimizer does not step in backward.
    """
    changes: dict[str, object] = {}
    for option in options:
        if option.setting == "optimizer_in_backward" and config.accumulate > 1:
            continue
        if option.setting == "offload":
            before = changes.get("offload", config.offload)
            assert isinstance(before, tuple)
            changes["offload"] = (*before, option.value)
        else:
            changes[option.setting] = option.value
    return config.model_copy(update=changes)


def cost(options: Sequence[MemoryOption]) -> float:
    """The share of a step's time that these memory options cost together."""
    return sum(option.cost for option in options)
