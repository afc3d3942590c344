"""Add an adapter's pairs to a model's weights, tensor by tensor.

The sum is W + scale * B @ A, in fp32.
A DoRA adapter's sum V becomes m_i V_i / ||V_i||, row by row (`kernels.linear.dora`).
"""

from __future__ import annotations

import torch

from engine.config.choices import MergeOnto
from engine.errors import CheckpointError
from engine.model_sources.adapter.adapted_source import AdaptedSource, with_pair
from engine.model_sources.expert_tensors import StoredExperts
from engine.model_sources.interface.view import LayersView
from engine.model_sources.quantised.stored_codes import stays_as_stored, stored_kind
from kernels.nf4 import dequantize, quantize
from models.tensor_names import is_quantised


class Merger:
    """Turns each tensor of the base into that of the merged model; uses every pair once.

    `double_quant` are the scales of the weights that 4-bit training saw. Without `pairs` it makes
    the weights below them. `dtype` is what they are written in, by default each tensor's own.
    """

    def __init__(
        self,
        source: AdaptedSource,
        onto: MergeOnto,
        *,
        double_quant: bool,
        pairs: bool = True,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._source = source
        given = source.pairs if pairs else {}
        self._pairs = {f"{module}.weight": pair for module, pair in given.items()}
        self._onto, self._dtype = onto, dtype
        self._experts = StoredExperts(source)
        self._double_quant = double_quant
        self._kind = stored_kind(source)
        self.merged = 0
        self.requantised = 0

    def __call__(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        if self._experts.fuses(name):
            return self._merge_experts(name, tensor)
        through = self._onto == "dequantised" and name not in self._source.copied
        through = through and not stays_as_stored(self._source, self._kind, name)
        if through and self._experts.holds(name):
            tensor = self._experts.through_nf4(name, self._double_quant)
            self.requantised += 1
        elif through and is_quantised(name):
            tensor = _through_nf4(name, tensor, self._double_quant)
            self.requantised += 1
        pair = self._pairs.pop(name, None)
        if pair is None:
            return tensor
        self.merged += 1
        return with_pair(tensor, pair, self._source.scales[name.removesuffix(".weight")])

    def _merge_experts(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of all experts' weights (E, out, in); every expert has pairs of its own."""
        below = tensor
        if self._onto == "dequantised":
            below = self._experts.through_nf4(name, self._double_quant)
            self.requantised += 1
        modules = self._experts.modules(name, below)
        pairs = {
            path: self._pairs.pop(f"{path}.weight")
            for path in modules
            if f"{path}.weight" in self._pairs
        }
        if not pairs:
            return below
        # One expert is in fp32 at a time, for all of a layer can be the model's largest tensor.
        merged = torch.empty_like(below, dtype=self._dtype or self._source.dtype(name))
        for path, target in self._experts.modules(name, merged).items():
            expert, pair = modules[path], pairs.get(path)
            if pair is not None:
                expert = with_pair(expert, pair[:2], self._source.scales[path])
                self.merged += 1
            target.copy_(expert)
        return merged


def _through_nf4(name: str, tensor: torch.Tensor, double_quant: bool) -> torch.Tensor:
    try:
        return dequantize(quantize(tensor, double_quant=double_quant), dtype=torch.float32)
    except ValueError as error:
        raise CheckpointError(f"tensor {name} cannot be quantised: {error}.") from error


class BelowPairs(LayersView):
    """The weights below an adapter's pairs, as the merger takes them."""

    def __init__(self, source: AdaptedSource, onto: MergeOnto, *, double_quant: bool) -> None:
        super().__init__(source)
        self._below = Merger(source, onto, double_quant=double_quant, pairs=False)

    def tensor(self, name: str) -> torch.Tensor:
        return self._below(name, self.base.tensor(name))

    def codes(self, name: str) -> None:
        """None: its tensors are decoded."""
