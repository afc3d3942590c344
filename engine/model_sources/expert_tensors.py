"""The experts of a mixture, as a file stores them.

Adapters name every expert by itself (`mlp.experts.3.up_proj`), whatever the file's layout.
"""

from __future__ import annotations

from functools import cached_property

import torch

from engine.model_sources.interface.model_source import ModelSource
from kernels.nf4 import dequantize, quantize
from models.tensor_layout import Layout
from models.tensor_names import graph_tensors

_EXPERTS = ".mlp.experts."


class StoredExperts:
    """Looks at the experts' tensors of `source`."""

    def __init__(self, source: ModelSource) -> None:
        self._source = source
        self._decoded: dict[str, torch.Tensor] = {}

    @cached_property
    def layout(self) -> Layout:
        """How the file names and divides the graph's parameters."""
        return Layout.of_names(self._source.config, self._source.names())

    @cached_property
    def _graph(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Stored name of an expert's tensor -> the graph's parameter and its shape."""
        return {
            part: (name, shape)
            for name, shape in graph_tensors(self._source.config).items()
            if _EXPERTS in name
            for part in self.layout.parts(name, shape)
        }

    def holds(self, name: str) -> bool:
        """Whether `name` is a tensor of experts."""
        return name in self._graph

    def fuses(self, name: str) -> bool:
        """Whether `name` is one tensor for all experts."""
        return self.holds(name) and self.layout.fused

    def modules(self, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """Module path of every expert -> its rows of the fused tensor, views."""
        graph_name, _ = self._graph[name]
        divided = Layout(self.layout.nested, fused=False).divide(graph_name, tensor)
        return {part.removesuffix(".weight"): rows for part, rows in divided.items()}

    def adaptable(self) -> dict[str, tuple[int, ...]]:
        """Module path -> (out, in) of every matrix that an adapter may name."""
        source = self._source
        shapes: dict[str, tuple[int, ...]] = {}
        for name in source.names():
            if self.fuses(name):
                graph_name, shape = self._graph[name]
                parts = Layout(self.layout.nested, fused=False).parts(graph_name, shape)
                shapes |= {part.removesuffix(".weight"): size for part, size in parts.items()}
            elif name.endswith(".weight"):
                shapes[name.removesuffix(".weight")] = source.shape(name)
        return shapes

    def through_nf4(self, name: str, double_quant: bool = True) -> torch.Tensor:
        """Tensor `name` as 4-bit training saw it: all experts of a projection share its scales.

        Keeps the layer's decoded experts, since a divided file's next tensors are among them.
        """
        graph_name, shape = self._graph[name]
        if name not in self._decoded:
            whole = self.layout.assemble(graph_name, shape, self._source.tensor)
            halves = whole.chunk(2, 1) if graph_name.endswith("gate_up_proj") else (whole,)
            decoded = [
                dequantize(quantize(half, double_quant=double_quant), dtype=torch.float32)
                for half in halves
            ]
            self._decoded = self.layout.divide(graph_name, torch.cat(decoded, 1))
        return self._decoded[name]
