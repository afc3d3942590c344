"""Decoded weights of the last layers that stay in memory.

Every layer decodes its frozen weights in forward and again in backward. With memory to spare the
decoded matrices stay instead, beside their codes. The base never changes, so they stay for the
whole run: dropping them after a step would free memory only where none is short. The last layers
come first, whose weights backward asks for soonest. Results are the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from kernels.linear.decode import lasting_weights
from kernels.runtime.scratch import use_pool
from models.layers.block import DecoderLayer
from models.layers.linear import Linear


def keep_decoded(layers: Sequence[DecoderLayer], dtype: torch.dtype) -> None:
    """Decode the weights of `layers` to `dtype` to stay. Adapters must be in place.

    Experts of mixtures are left out: a step decodes few of them.
    """
    with use_pool({}):  # where every layer's weights stay, no step needs this scratch again
        for layer in layers:
            for group in _groups(layer):
                lasting = lasting_weights([linear.projection() for linear in group], dtype)
                for linear in group:
                    linear.lasting = lasting


def lasting_matrices(model: nn.Module) -> list[Tensor]:
    """The decoded matrices that stay, each once."""
    matrices = {
        id(module.lasting): module.lasting.matrix
        for module in model.modules()
        if isinstance(module, Linear) and module.lasting is not None
    }
    return list(matrices.values())


def _groups(layer: DecoderLayer) -> Iterator[tuple[Linear, ...]]:
    """The layer's quantised projections as `kernels.linear.decode` is asked for them."""
    groups = [*layer.mixer.same_input(), *layer.mlp.same_input()]
    grouped = {id(linear) for group in groups for linear in group}
    alone = [m for m in layer.modules() if isinstance(m, Linear) and id(m) not in grouped]
    for group in (*groups, *((linear,) for linear in alone)):
        if not any(isinstance(linear.weight, torch.Tensor) for linear in group):
            yield group
