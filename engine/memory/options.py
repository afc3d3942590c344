"""The ladder of settings that buy memory with time, the cheapest step first.

What a step costs is assumed, as a share of the step's time, from the ratio of what it moves or
decodes to what a layer computes (bytes over a card's bus and operations over its rate for a few
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
    "mlp_tile_rows",
    "loss_chunk_rows",
    "head_precision",
    "decode_singly",
    "max_length",
)
"""The settings that a search may change, in the order in which they are shown."""

_WIDE_TILE, _NARROW_TILE, _FEW_ROWS = 2048, 512, 64


@dataclass(frozen=True)
class Lever:
    """One step of the ladder: what it sets, and the share of a step's time that it costs."""

    setting: str
    value: object
    cost: float


def ladder(config: TrainConfig, card: bool, tied: bool) -> list[Lever]:
    """The levers that this run can pull and has not pulled, the cheapest first.

    What lends memory to the host is for a card only, and a tied embedding stays with the head. The
    optimizer steps in backward only where that learns the same: see `steps_in_backward`.
    """
    frozen = config.method != "full"
    tile, rows = config.mlp_tile_rows, config.loss_chunk_rows
    streams = config.method == "qlora" and not config.use_dora
    choices = (
        (card and frozen and not tied, Lever("embedding_on", "host", 0.001)),
        (steps_in_backward(config), Lever("optimizer_in_backward", True, 0.005)),
        (card, Lever("offload", "checkpoints", 0.01)),
        (tile is None or tile > _WIDE_TILE, Lever("mlp_tile_rows", _WIDE_TILE, 0.01)),
        (rows > _FEW_ROWS, Lever("loss_chunk_rows", _FEW_ROWS, 0.02)),
        (frozen, Lever("head_precision", "8bit", 0.02)),
        (tile is None or tile > _NARROW_TILE, Lever("mlp_tile_rows", _NARROW_TILE, 0.03)),
        (True, Lever("decode_singly", True, 0.15)),
        (card and streams, Lever("offload", "weights", 0.5)),
    )
    return [lever for possible, lever in choices if possible and not _pulled(config, lever)]


def _pulled(config: TrainConfig, lever: Lever) -> bool:
    present = getattr(config, lever.setting)
    return lever.value in present if lever.setting == "offload" else bool(present == lever.value)


def steps_in_backward(config: TrainConfig) -> bool:
    """Whether the optimizer of these settings may step in backward and learn the same."""
    alone = config.max_grad_norm == 0 and config.accumulate == 1
    return config.method == "full" and alone and config.dtype != "float16"


def pull(config: TrainConfig, levers: Sequence[Lever]) -> TrainConfig:
    """The settings with these levers pulled; of two for one setting the later stands.

    Where the settings accumulate, the optimizer does not step in backward.
    """
    changes: dict[str, object] = {}
    for lever in levers:
        if lever.setting == "optimizer_in_backward" and config.accumulate > 1:
            continue
        if lever.setting == "offload":
            before = changes.get("offload", config.offload)
            assert isinstance(before, tuple)
            changes["offload"] = (*before, lever.value)
        else:
            changes[lever.setting] = lever.value
    return config.model_copy(update=changes)


def cost(levers: Sequence[Lever]) -> float:
    """The share of a step's time that these levers cost together."""
    return sum(lever.cost for lever in levers)
