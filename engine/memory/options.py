"""Memory-saving options, cheapest first, and the order of their combinations.

What a step costs is assumed, as a share of the step's time, from the ratio of what it moves or
decodes to what a layer computes (bytes over a GPU's bus and operations over its rate for a few
thousand tokens): it decides the order in which settings are tried and nothing else. None changes
the gradients but the 8-bit head, which rounds the head once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product

from engine.config.choices import POLICIES
from engine.config.rules import Facts, allows
from engine.config.spelling import given_chunk
from engine.config.train_config import TrainConfig

NAMES = (
    "gradient_checkpointing",
    "keep_decoded",
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

_WIDE_TILE, _NARROW_TILE = 2048, 512
_SHORT_CHUNK, _SHORTEST_CHUNK = 256, 64

_RECOMPUTING = {"none": 0.0, "selective": 0.3, "full": 0.35}
_HALVED_BATCH = 0.03


@dataclass(frozen=True)
class MemoryOption:
    """What an option sets, and the share of a step's time that it costs."""

    setting: str
    value: object
    cost: float


def memory_options(config: TrainConfig, gpu: bool, tied: bool) -> list[MemoryOption]:
    """The memory options that this run can take and has not taken, the cheapest first.

    Offloading is for a GPU only. `engine.config.rules` says which settings the run's others and a
    tied embedding allow.
    """
    tile = config.mlp_tile_tokens
    rows = given_chunk(config.loss_chunk_tokens) or math.inf
    facts = Facts(tied=tied)
    graphs = config.cuda_graphs  # named where a rule of theirs is asked for
    checkpoints, weights = (*config.offload, "checkpoints"), (*config.offload, "weights")
    can = partial(allows, config, facts)
    choices = (
        (gpu and can(embedding_on="host"), MemoryOption("embedding_on", "host", 0.001)),
        (can(optimizer_in_backward=True), MemoryOption("optimizer_in_backward", True, 0.005)),
        (
            gpu and can(offload=checkpoints, cuda_graphs=graphs),
            MemoryOption("offload", "checkpoints", 0.01),
        ),
        (tile is None or tile > _WIDE_TILE, MemoryOption("mlp_tile_tokens", _WIDE_TILE, 0.01)),
        (gpu and rows > _SHORT_CHUNK, MemoryOption("loss_chunk_tokens", _SHORT_CHUNK, 0.005)),
        (rows > _SHORTEST_CHUNK, MemoryOption("loss_chunk_tokens", _SHORTEST_CHUNK, 0.02)),
        (can(head_precision="8bit"), MemoryOption("head_precision", "8bit", 0.02)),
        (tile is None or tile > _NARROW_TILE, MemoryOption("mlp_tile_tokens", _NARROW_TILE, 0.03)),
        (True, MemoryOption("low_memory_decode", True, 0.15)),
        (gpu and can(offload=weights, cuda_graphs=graphs), MemoryOption("offload", "weights", 0.5)),
    )
    return [option for possible, option in choices if possible and not _taken(config, option)]


def _taken(config: TrainConfig, option: MemoryOption) -> bool:
    present = getattr(config, option.setting)
    return option.value in present if option.setting == "offload" else bool(present == option.value)


def apply_options(config: TrainConfig, options: Sequence[MemoryOption]) -> TrainConfig:
    """The settings with these memory options; of two for one setting the later stands.

    Where the settings accumulate, the optimizer does not step in backward.
    """
    changes: dict[str, object] = {}
    for option in options:
        stepping = option.setting == "optimizer_in_backward"
        if stepping and not allows(config, optimizer_in_backward=True):
            continue
        if option.setting == "offload":
            before = changes.get("offload", config.offload)
            assert isinstance(before, tuple)
            changes["offload"] = (*before, option.value)
        else:
            changes[option.setting] = option.value
    return config.model_copy(update=changes)


def combinations(
    config: TrainConfig, options: Sequence[MemoryOption]
) -> list[tuple[str, int, int]]:
    """(policy, rows of a micro-batch, how many of `options`), the least assumed time first.

    Micro-batches divide the rows of a step.
    """
    rows = config.batch_size * config.accumulate
    sizes = [size for size in range(1, config.batch_size + 1) if rows % size == 0]
    priced = []
    for policy, size, count in product(POLICIES, sizes, range(len(options) + 1)):
        halvings = (config.batch_size // size).bit_length() - 1
        time = (1.0 + _RECOMPUTING[policy]) * (1.0 + _HALVED_BATCH * halvings)
        time *= 1.0 + sum(option.cost for option in options[:count])
        priced.append((time, policy, size, count))
    return [(policy, size, count) for _, policy, size, count in sorted(priced)]


def flag(name: str, value: object) -> str:
    """A setting as the command line takes it: `--name value`, or `--name`, or `--no-name`."""
    option = f"--{name.replace('_', '-')}"
    if isinstance(value, bool):
        return option if value else f"--no-{option[2:]}"
    text = (",".join(map(str, value)) or "none") if isinstance(value, tuple) else str(value)
    return f"{option} {text}"
