"""Exponential moving average of the weights that are trained.

After the first update the average is the weights; after each further one

    average = decay * average + (1 - decay) * weights

in fp32, or wider where the weights are. These are the averages of torch's `AveragedModel` with
`get_ema_multi_avg_fn(decay)`. Source: Polyak & Juditsky 1992; Tarvainen & Valpola 2017
(arXiv 1703.01780) for the exponential form.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

_PART = 1 << 22
"""Elements of a 16-bit weight that exist in fp32 at a time."""


class WeightAverage:
    """The average of the trainable parameters among `named`; `updates` counts those it has seen.

    Raises `ValueError` for a decay that is not between 0 and 1, and where nothing is trained.
    """

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]], decay: float) -> None:
        if not 0.0 < decay < 1.0:
            raise ValueError(f"the decay of an average must lie between 0 and 1, got {decay}")
        self._weights = {name: p for name, p in named if p.requires_grad}
        if not self._weights:
            raise ValueError("no parameter requires a gradient, so there is nothing to average")
        self.decay, self.updates = decay, 0
        self._averages = {
            name: torch.empty_like(p, dtype=_wide(p), requires_grad=False).copy_(p.detach())
            for name, p in self._weights.items()
        }

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights as they are after an update."""
        share = 1.0 if self.updates == 0 else 1.0 - self.decay
        for name, weight in self._weights.items():
            average = self._averages[name]
            if weight.dtype == average.dtype:
                average.lerp_(weight, share)
                continue
            parts = zip(average.view(-1).split(_PART), weight.view(-1).split(_PART), strict=True)
            for own, new in parts:
                own.lerp_(new.float(), share)
        self.updates += 1

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The parameters have the averages inside the block, and then what they had before.

        Before the first update they stay as they are.
        """
        if self.updates == 0:
            yield
            return
        before = {name: weight.detach().clone() for name, weight in self._weights.items()}
        self._set(self._averages)
        try:
            yield
        finally:
            self._set(before)

    @torch.no_grad()
    def _set(self, values: dict[str, Tensor]) -> None:
        for name, weight in self._weights.items():
            weight.copy_(values[name])

    def state_tensors(self) -> dict[str, Tensor]:
        """The averages by the parameters' names, sharing memory."""
        return dict(self._averages)

    @torch.no_grad()
    def load_state_tensors(self, tensors: dict[str, Tensor], updates: int) -> None:
        """Go on from averages that `state_tensors` gave. Raises `ValueError` for other names."""
        if tensors.keys() != self._averages.keys():
            raise ValueError("the averages are of other parameters")
        for name, average in self._averages.items():
            average.copy_(tensors[name])
        self.updates = updates


def _wide(weight: Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32)
